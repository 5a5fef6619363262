// Two graph panes side by side, as one component of a page: the float graph and the quantized one.
//
// Holds the two documents in which Netron draws, hands them graphs and figures once and then only
// what changed, keeps their selections together, and tells the page's script what was clicked.
// Names out of models are set as text only.

const PANE = 'quant-inspector-pane';
const PAGE = 'quant-inspector-page';
const SIDES = ['float', 'quantized'];
const KEYS = ['j', 'k', 'z', '/', '?'];
// Milliseconds within which a pane's document says that it is there.
const PATIENCE = 20000;
// Milliseconds after which the next report is made although the page did not run.
const ANSWER = 5000;
// Milliseconds within which a selection that comes back is the answer to a click here.
const ECHO = 15000;
const SVG_TYPE = 'image/svg+xml';

const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) {
        element.className = className;
    }
    if (text !== undefined) {
        element.textContent = text;
    }
    return element;
};

const counted = (count) => `${count.toLocaleString('en-US')} ${count === 1 ? 'node' : 'nodes'}`;

const color = (value) => (/^#(?:[0-9a-f]{3}|[0-9a-f]{6})$/i.test(value) ? value : '#a1a1aa');

// A figure of a measure as it is read: a share in percent.
const read = (measure, value) => {
    return measure.unit === 'share' ? String(Number((100 * value).toPrecision(4))) : String(value);
};

const unitOf = (measure) => (measure.unit === 'share' ? '%' : measure.unit);

// What each colour of a measure stands for, worst first like the colours.
const ranges = (measure) => {
    const steps = measure.steps.map((step) => read(measure, step));
    if (steps.length === 0) {
        return ['any'];
    }
    const bands = [`< ${steps[0]}`];
    for (let at = 1; at < steps.length; at++) {
        bands.push(`${steps[at - 1]}–${steps[at]}`);
    }
    bands.push(`≥ ${steps[steps.length - 1]}`);
    return measure.better === 'higher' ? bands : bands.reverse();
};

class Panes {

    constructor(parent) {
        this.parent = parent;
        this.data = null;
        this.sheet = null;
        this.sheetUrl = '';
        this.selection = null; // {side, names}, the last one is what the page knows
        this.own = []; // {text, at}: selections told to the page that have not come back yet
        this.seen = 'null'; // the page's selection when it was looked at last
        this.legendFor = '';
        this.reports = []; // what the page's script has not been told yet
        this.reporting = 0; // the timer of the report that is under way
        this.panes = {};
        this.hear = (event) => this.receive(event);
        this.build();
        window.addEventListener('message', this.hear);
    }

    dispose() {
        window.removeEventListener('message', this.hear);
        window.clearTimeout(this.reporting);
        for (const pane of Object.values(this.panes)) {
            window.clearTimeout(pane.timer);
            window.clearTimeout(pane.noteTimer);
        }
        this.root.remove();
    }

    // ------------------------------------------------------------------------------ elements

    build() {
        this.root = make('div', 'qi');
        this.legend = make('div', 'legend');
        this.legend.setAttribute('role', 'note');
        this.split = make('div', 'split');
        this.root.append(this.legend, this.split);
        const divider = make('div', 'divider');
        divider.setAttribute('role', 'separator');
        divider.setAttribute('aria-orientation', 'vertical');
        divider.setAttribute('aria-label', 'Width of the two graphs');
        divider.title = 'Drag to share the width; double-click for halves';
        divider.tabIndex = 0;
        for (const side of SIDES) {
            this.panes[side] = this.buildPane(side);
        }
        this.split.append(this.panes.float.box, divider, this.panes.quantized.box);
        this.share = 0.5;
        const setShare = (share) => {
            this.share = Math.min(0.85, Math.max(0.15, share));
            this.split.style.gridTemplateColumns =
                `minmax(0, ${this.share}fr) 8px minmax(0, ${1 - this.share}fr)`;
        };
        setShare(0.5);
        divider.addEventListener('pointerdown', (event) => {
            event.preventDefault();
            divider.setPointerCapture(event.pointerId);
            this.root.classList.add('dragging');
        });
        divider.addEventListener('pointermove', (event) => {
            if (divider.hasPointerCapture(event.pointerId)) {
                const box = this.split.getBoundingClientRect();
                setShare((event.clientX - box.left) / box.width);
            }
        });
        divider.addEventListener('lostpointercapture', () => this.root.classList.remove('dragging'));
        divider.addEventListener('dblclick', () => setShare(0.5));
        divider.addEventListener('keydown', (event) => {
            const step = { ArrowLeft: -0.05, ArrowRight: 0.05 }[event.key];
            if (step) {
                event.preventDefault();
                setShare(this.share + step);
            }
        });
        this.parent.appendChild(this.root);
    }

    buildPane(side) {
        const box = make('section', `pane ${side}`);
        box.setAttribute('aria-label', `${side} graph`);
        const caption = make('div', 'caption');
        const count = make('span', 'count', '');
        caption.append(make('span', 'spot'), make('span', 'name', side), count, make('span', 'gap'));
        const pane = { side, box, count, url: '', ready: false, hello: false, sent: '', theme: '' };
        const button = (label, title, act) => {
            const element = make('button', 'tool', label);
            element.type = 'button';
            element.title = title;
            element.setAttribute('aria-label', `${title} (${side})`);
            element.disabled = true;
            element.addEventListener('click', act);
            caption.appendChild(element);
            return element;
        };
        const picture = (format, purpose) => () => {
            this.busy(pane, true);
            if (format === 'png') {
                this.covered(pane, 'Making the picture…');
            }
            this.send(pane, { type: 'picture', format, purpose });
        };
        pane.tools = [
            button('−', 'Zoom out', () => this.send(pane, { type: 'zoom', factor: 0.8 })),
            button('+', 'Zoom in', () => this.send(pane, { type: 'zoom', factor: 1.25 })),
            button('Fit', 'Fit to the width', () => this.send(pane, { type: 'fit' })),
            button('SVG', 'Save the coloured graph as SVG', picture('svg', 'download')),
            button('PNG', 'Save the coloured graph as PNG', picture('png', 'download'))
        ];
        pane.keep = button('To report', 'Keep the picture for the report', picture('svg', 'keep'));
        pane.tools.push(pane.keep);
        const stage = make('div', 'stage');
        pane.frame = make('iframe');
        pane.frame.title = `${side} graph`;
        pane.frame.referrerPolicy = 'no-referrer';
        pane.cover = make('div', 'cover');
        pane.note = make('div', 'note');
        pane.note.setAttribute('role', 'status');
        stage.append(pane.frame, pane.cover, pane.note);
        box.append(caption, stage);
        return pane;
    }

    busy(pane, busy) {
        pane.busy = busy;
        for (const tool of pane.tools) {
            tool.disabled = busy || !pane.ready;
        }
    }

    covered(pane, text) {
        pane.cover.className = 'cover waiting';
        pane.cover.replaceChildren(make('span', 'spinner'), make('span', '', text));
    }

    uncovered(pane) {
        pane.cover.className = 'cover gone';
        pane.cover.replaceChildren();
    }

    failed(pane, message) {
        window.clearTimeout(pane.timer);
        pane.ready = false;
        this.busy(pane, false);
        const again = make('button', 'again', 'Try again');
        again.type = 'button';
        again.addEventListener('click', () => this.open(pane));
        pane.cover.className = 'cover broken';
        const box = make('div', 'error');
        box.setAttribute('role', 'alert');
        box.append(
            make('strong', '', `The ${pane.side} graph is not drawn`), make('p', '', message), again
        );
        pane.cover.replaceChildren(box);
        this.report('failed', { side: pane.side, message });
    }

    say(pane, text) {
        pane.note.textContent = text;
        pane.note.classList.add('shown');
        window.clearTimeout(pane.noteTimer);
        pane.noteTimer = window.setTimeout(() => pane.note.classList.remove('shown'), 6000);
    }

    // -------------------------------------------------------------------------------- legend

    showLegend() {
        const measure = this.measure();
        const threshold = this.data.threshold;
        const present = this.marks();
        const drawn = JSON.stringify(
            [measure, threshold, this.sheet && this.sheet.no_figure, [...present]]
        );
        if (drawn === this.legendFor) {
            return;
        }
        this.legendFor = drawn;
        const parts = [];
        if (measure) {
            const unit = unitOf(measure) ? `, ${unitOf(measure)}` : '';
            const title = make('span', 'title', `${measure.label}${unit}`);
            parts.push(title, make('span', 'direction', `${measure.better} is better`));
            const scale = make('span', 'scale');
            ranges(measure).forEach((range, at) => {
                const swatch = make('span', 'swatch', range);
                swatch.style.backgroundColor = color(measure.colors[at]);
                swatch.style.color = color(measure.texts[at]);
                scale.appendChild(swatch);
            });
            parts.push(scale);
            if (threshold !== null && threshold !== undefined) {
                const sign = measure.better === 'higher' ? '>' : '<';
                const limit = read(measure, threshold);
                parts.push(make('span', 'swatch alone calm', `${sign} ${limit}: not coloured`));
            }
        }
        if (this.sheet) {
            const none = make('span', 'swatch alone', 'no figure');
            // As pale as in the panes: the middle of the scale is grey as well.
            const grey = color(this.sheet.no_figure);
            none.style.backgroundColor = `color-mix(in srgb, ${grey} 30%, transparent)`;
            parts.push(none);
        }
        const marks = make('span', 'marks');
        for (const [name, sign, text] of [
            ['excluded', '', 'to leave in float'],
            ['float-again', '', 'float again'],
            ['still-wrapped', '▲', 'still wrapped'],
            ['worse-part', '!', 'a part is worse'],
            ['unmatched', '?', 'no partner'],
            ['preview', '●', 'preview']
        ]) {
            if (!present.has(name)) {
                continue;
            }
            const mark = make('span', 'mark');
            mark.append(make('span', `sample ${name}`, sign), make('span', '', text));
            marks.appendChild(mark);
        }
        parts.push(marks);
        this.legend.replaceChildren(...parts);
    }

    // The marks that stand on some node now: the legend explains no others.
    marks() {
        const found = new Set();
        for (const side of this.sheet ? Object.values(this.sheet.sides) : []) {
            for (const node of Object.values(side)) {
                for (const mark of node.marks || []) {
                    found.add(mark.replaceAll(' ', '-'));
                }
            }
        }
        if ((this.data.excluded || []).length > 0) {
            found.add('excluded');
        }
        if (Object.keys(this.data.changed || {}).length > 0) {
            found.add('preview');
        }
        return found;
    }

    measure() {
        const measures = this.sheet ? this.sheet.measures : [];
        return measures.find((each) => each.key === this.data.measure) || null;
    }

    // --------------------------------------------------------------------------------- panes

    send(pane, message) {
        const target = pane.frame.contentWindow;
        if (target && pane.hello) {
            target.postMessage({ from: PAGE, side: pane.side, ...message }, window.location.origin);
        }
    }

    open(pane) {
        pane.url = this.data.urls[pane.side];
        pane.ready = false;
        pane.hello = false;
        delete pane.box.dataset.drawn;
        pane.sent = '';
        pane.theme = '';
        pane.count.textContent = '';
        this.busy(pane, false);
        this.covered(pane, 'Drawing…');
        window.clearTimeout(pane.timer);
        pane.timer = window.setTimeout(() => {
            this.failed(pane, 'Its document does not answer. Reload the page.');
        }, PATIENCE);
        pane.frame.src = this.data.urls.pane;
    }

    greet(pane) {
        window.clearTimeout(pane.timer);
        pane.hello = true;
        this.sendTheme(pane);
        this.send(pane, { type: 'load', url: pane.url, name: pane.side });
    }

    sendTheme(pane) {
        if (pane.theme !== this.data.theme) {
            pane.theme = this.data.theme;
            this.send(pane, { type: 'theme', theme: this.data.theme });
        }
    }

    sendSheet(pane) {
        if (this.sheet) {
            this.send(pane, {
                type: 'sheet',
                measures: this.sheet.measures,
                noFigure: this.sheet.no_figure,
                nodes: this.sheet.sides[pane.side] || {}
            });
        }
    }

    sendLook(pane) {
        const { measure, threshold, excluded, changed, keys } = this.data;
        const look = {
            measure, threshold: threshold === undefined ? null : threshold,
            excluded: excluded || [], changed: changed || {}, keys: keys || KEYS
        };
        const text = JSON.stringify(look);
        if (pane.ready && pane.sent !== text) {
            pane.sent = text;
            this.send(pane, { type: 'paint', look });
        }
    }

    showCount(pane) {
        const text = this.countText(pane);
        const end = text.lastIndexOf(' ');
        pane.count.title = text;
        // The word gives way where the pane is narrow.
        pane.count.replaceChildren(text.slice(0, end), make('span', 'unit', text.slice(end)));
    }

    countText(pane) {
        const shown = counted(pane.nodes);
        const nodes = this.sheet ? Object.values(this.sheet.sides[pane.side] || {}) : [];
        // Netron draws constants inside the nodes that read them.
        const all = nodes.filter((node) => node.op !== 'Constant').length;
        return all > pane.nodes ?
            `${pane.nodes.toLocaleString('en-US')} of ${counted(all)}` : shown;
    }

    async fetchSheet() {
        const url = this.data.urls.sheet;
        this.sheetUrl = url;
        let sheet = null;
        try {
            const answer = await fetch(url, { credentials: 'same-origin', cache: 'no-store' });
            if (!answer.ok) {
                throw new Error(`the server answers ${answer.status}`);
            }
            sheet = await answer.json();
        } catch (error) {
            if (this.sheetUrl === url) {
                const message = `The figures cannot be fetched: ${error.message}`;
                this.legend.replaceChildren(make('span', 'trouble', message));
                this.legendFor = '';
                this.report('failed', { side: '', message });
            }
            return;
        }
        if (this.sheetUrl !== url) {
            return; // a newer one is under way
        }
        this.sheet = sheet;
        this.showLegend();
        for (const pane of Object.values(this.panes)) {
            if (pane.ready) {
                this.showCount(pane);
                this.sendSheet(pane);
            }
        }
        this.applySelection({ instant: true, only: null });
    }

    // ----------------------------------------------------------------------------- selection

    partners(side, names) {
        const nodes = this.sheet ? this.sheet.sides[side] || {} : {};
        const found = new Set();
        for (const name of names) {
            const node = Object.hasOwn(nodes, name) ? nodes[name] : null;
            for (const partner of node ? node.partners || [] : []) {
                found.add(partner);
            }
        }
        return [...found];
    }

    // only: the one pane to bring up to date. clicked: the pane that needs no scrolling.
    applySelection({ instant = false, only = null, clicked = null }) {
        for (const pane of Object.values(this.panes)) {
            if (!pane.ready || (only && pane !== only)) {
                continue;
            }
            let names = [];
            let first = null;
            if (this.selection && this.selection.names.length > 0) {
                const { side } = this.selection;
                const own = this.selection.names;
                const last = own[own.length - 1];
                names = pane.side === side ? own : this.partners(side, own);
                first = pane.side === side ? last : this.partners(side, [last])[0] || null;
            }
            if (pane.side === clicked) {
                first = null;
            }
            this.send(pane, { type: 'select', names, first, instant });
        }
    }

    tell() {
        const { selection } = this;
        const names = selection ? selection.names : [];
        const value = names.length > 0 ?
            { side: selection.side, name: names[names.length - 1] } : null;
        this.own.push({ text: JSON.stringify(value), at: performance.now() });
        this.callbacks.setStateValue('selected', value && { ...value, names });
    }

    clicked(pane, name, several) {
        const same = this.selection && this.selection.side === pane.side;
        let names = [name];
        if (several && same) {
            const rest = this.selection.names.filter((each) => each !== name);
            names = rest.length < this.selection.names.length ? rest : [...rest, name];
        }
        this.selection = { side: pane.side, names };
        this.applySelection({ clicked: pane.side });
        this.tell();
    }

    toggled(pane, name) {
        const { selection } = this;
        const selected = selection ? selection.names : [];
        let side = pane.side;
        let names = [name];
        if (!name) {
            // The key: what is selected, in whichever pane.
            if (selected.length === 0) {
                return;
            }
            ({ side } = selection);
            names = selected;
        } else if (selection && selection.side === pane.side && selected.includes(name)) {
            names = selected;
        }
        const last = name || names[names.length - 1];
        this.report('toggled', { side, name: last, names });
    }

    pageSelection() {
        const text = JSON.stringify(this.data.selected || null);
        if (text === this.seen) {
            return;
        }
        this.seen = text;
        const oldest = performance.now() - ECHO;
        this.own = this.own.filter((each) => each.at > oldest);
        const at = this.own.findIndex((each) => each.text === text);
        if (at >= 0) {
            this.own.splice(0, at + 1); // an answer to what was clicked here
            return;
        }
        this.own = [];
        const { selected } = this.data;
        this.selection = selected ? { side: selected.side, names: [selected.name] } : null;
        this.applySelection({});
    }

    // One report at a time: of two that reach Streamlit while the page runs, the first is lost.
    report(name, value) {
        this.reports.push([name, value]);
        this.nextReport();
    }

    nextReport() {
        if (this.reporting || this.reports.length === 0) {
            return;
        }
        const [name, value] = this.reports.shift();
        this.reporting = window.setTimeout(() => this.reported(), ANSWER);
        this.callbacks.setTriggerValue(name, value);
    }

    // The page has run, or does not show it.
    reported() {
        window.clearTimeout(this.reporting);
        this.reporting = 0;
        this.nextReport();
    }

    // ------------------------------------------------------------------------------ messages

    receive(event) {
        const pane = Object.values(this.panes).find((each) => {
            return event.source !== null && each.frame.contentWindow === event.source;
        });
        const message = event.data;
        if (!pane || event.origin !== window.location.origin || !message ||
            message.from !== PANE || !this.data) {
            return;
        }
        switch (message.type) {
            case 'hello':
                this.greet(pane);
                break;
            case 'drawing':
                pane.ready = false;
                this.busy(pane, false);
                this.covered(pane, `Drawing ${counted(message.nodes)}…`);
                break;
            case 'slow':
                this.covered(pane, 'Drawing a large graph…');
                break;
            case 'drawn':
                this.drawn(pane, message);
                break;
            case 'painted':
                pane.box.dataset.painted = message.milliseconds.toFixed(1);
                break;
            case 'clicked':
                this.clicked(pane, message.name, message.several);
                break;
            case 'toggled':
                this.toggled(pane, message.name);
                break;
            case 'key':
                this.pressed(message.key);
                break;
            case 'absent':
                this.say(pane, `${message.name} is not drawn as a node of its own`);
                break;
            case 'picture':
                this.picture(pane, message);
                break;
            case 'no-picture':
                this.busy(pane, false);
                this.uncovered(pane);
                this.say(pane, `No picture: ${message.message}`);
                break;
            case 'failed':
                if (pane.ready) {
                    // The graph stands; something about it went wrong.
                    this.say(pane, message.message);
                    this.report(
                        'failed', { side: pane.side, message: message.message }
                    );
                } else {
                    this.failed(pane, message.message);
                }
                break;
            default:
                break;
        }
    }

    drawn(pane, message) {
        // Later ones are of a body; the pane keeps its figures and its selection.
        const first = !pane.box.dataset.drawn;
        pane.ready = true;
        pane.nodes = message.nodes;
        pane.box.dataset.drawn = message.milliseconds.toFixed(0);
        this.showCount(pane);
        this.uncovered(pane);
        this.busy(pane, false);
        this.sendLook(pane);
        if (first) {
            this.sendSheet(pane);
            this.applySelection({ instant: true, only: pane });
        }
    }

    pressed(key) {
        if (key === '/' || key === '?') {
            // Only a script in the page's document can move the focus: as if pressed there.
            window.focus();
            document.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
            return;
        }
        this.report('key', { key });
    }

    async picture(pane, { format, purpose, blob }) {
        this.busy(pane, false);
        this.uncovered(pane);
        if (purpose === 'keep') {
            const answer = await fetch(this.data.picture, {
                method: 'PUT', body: blob, credentials: 'same-origin',
                headers: { 'Content-Type': format === 'svg' ? SVG_TYPE : 'image/png' }
            }).catch(() => null);
            if (answer && answer.ok) {
                this.say(pane, 'The picture is kept for the report');
                this.report('key', { key: 'picture', side: pane.side });
            } else {
                const why = answer ? await answer.text() : 'the server does not answer';
                this.say(pane, `The picture is not kept: ${why}`);
            }
            return;
        }
        const link = make('a');
        link.download = `${pane.side}-graph.${format}`;
        link.href = URL.createObjectURL(blob);
        link.click();
        window.setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    }

    // ---------------------------------------------------------------------------- each rerun

    update(data) {
        this.data = data;
        this.reported();
        // As much of the window as the rest of the page leaves.
        this.root.style.height = `max(${data.height || 560}px, calc(100vh - 225px))`;
        this.root.dataset.theme = data.theme === 'dark' ? 'dark' : 'light';
        for (const pane of Object.values(this.panes)) {
            pane.keep.hidden = !data.picture;
            if (pane.url !== data.urls[pane.side]) {
                this.open(pane);
            } else {
                if (pane.hello) {
                    this.sendTheme(pane);
                }
                this.sendLook(pane);
            }
        }
        if (this.sheetUrl !== data.urls.sheet) {
            this.fetchSheet();
        } else if (this.sheet) {
            this.showLegend();
        }
        this.pageSelection();
    }
}

const shown = new WeakMap();

export default function (component) {
    const { data, parentElement, setStateValue, setTriggerValue } = component;
    let panes = shown.get(parentElement);
    if (!panes) {
        panes = new Panes(parentElement);
        shown.set(parentElement, panes);
    }
    panes.callbacks = { setStateValue, setTriggerValue };
    panes.update(data);
    // Called once, when the page takes the component off.
    return () => {
        panes.dispose();
        shown.delete(parentElement);
    };
}
