// A field that takes files, as a component of a page: sends them in chunks and shows how far it is.
//
// Each chunk is acknowledged with the number of bytes that the server has. After a lost connection
// it is asked for that number and the upload goes on there; a server that was restarted knows
// nothing, so the page gets a new address from it and every file begins again. Uploads go on while
// another page is open. File names are set as text only.

const CHUNK = 8 * 1024 * 1024;
const TOGETHER = 2;
// Files up to this size are sent without asking first: a refusal can be heard after the body.
const SMALL = 32 * 1024;
// Rows that are shown at once; more files than that are counted.
const ROWS = 6;
// Milliseconds: between looks at the progress, without any progress, and without an answer at all.
const LOOK = 150;
const STALL = 60000;
const PATIENCE = 15 * 60000;
const PAUSES = [300, 700, 1500, 3000, 5000];
const SIGNS = { waiting: '·', sending: '↑', done: '✓', failed: '●' };

const make = (tag, className, text) => {
    const element = document.createElement(tag);
    element.className = className;
    if (text !== undefined) {
        element.textContent = text;
    }
    return element;
};

const button = (className, text, label, act) => {
    const element = make('button', className, text);
    element.type = 'button';
    element.title = label;
    element.addEventListener('click', act);
    return element;
};

// As the server writes sizes: three digits, 1 MB is 1,000,000 bytes.
const sized = (bytes) => {
    for (const [unit, factor] of [['GB', 1e9], ['MB', 1e6], ['kB', 1e3]]) {
        if (bytes >= factor * 0.9995) {
            const value = bytes / factor;
            return `${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${unit}`;
        }
    }
    return `${bytes} bytes`;
};

const lasting = (seconds) => {
    const whole = Math.ceil(seconds);
    return whole < 90 ? `${whole} s` : `${Math.ceil(whole / 60)} min`;
};

const counted = (count) => `${count.toLocaleString('en-US')} ${count === 1 ? 'file' : 'files'}`;

// A name as it is shown: what steers the direction of writing or cannot be seen is a dot.
const shown = (name) => name.replace(/[\p{Cc}\p{Cf}]/gu, '·');

// Long names lose their middle; the whole name is what a pointer over it shows.
const short = (name) => (name.length > 44 ? `${name.slice(0, 26)}…${name.slice(-16)}` : name);

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)),
    (byte) => byte.toString(16).padStart(2, '0')).join('');

const sleep = (milliseconds) => new Promise((resolve) => window.setTimeout(resolve, milliseconds));

// What the server says; status 0 where nobody answers.
const ask = (item, method, address, headers, body) => new Promise((resolve) => {
    const request = new XMLHttpRequest();
    let stall = 0;
    const alive = () => {
        window.clearTimeout(stall);
        stall = window.setTimeout(() => request.abort(), STALL);
    };
    request.open(method, address);
    for (const [name, value] of Object.entries(headers)) {
        request.setRequestHeader(name, value);
    }
    request.upload.onprogress = (event) => {
        alive();
        item.flying = event.loaded;
    };
    request.onloadend = () => {
        window.clearTimeout(stall);
        item.flying = 0;
        item.request = null;
        let said = {};
        try {
            said = JSON.parse(request.responseText);
        } catch {
            said = { text: request.responseText.slice(0, 200) };
        }
        resolve({ status: request.status, ...said });
    };
    item.request = request;
    alive();
    request.send(body);
});

class Field {

    constructor(name) {
        this.name = name;
        this.address = '';
        this.items = [];
        this.reported = true; // whether the page knows all that is through
        this.marks = []; // [time, bytes] of the last seconds: the speed
        this.timer = 0;
        this.view = null;
    }

    // ------------------------------------------------------------------------------- sending

    choose(files) {
        for (const file of files) {
            const item = { id: newId(), name: file.name, size: file.size, file };
            this.items.push(item);
            this.begin(item);
        }
        this.pump();
        this.draw();
    }

    begin(item) {
        Object.assign(item, { state: 'waiting', known: false, sent: 0, flying: 0, why: '',
            request: null });
        if (item.file.size > this.data.limit) {
            const most = this.data.limit_text;
            this.fail(item, `${sized(item.size)} is more than the ${most} this server takes`);
        }
    }

    pump() {
        const busy = this.items.filter((item) => item.state === 'sending').length;
        const next = this.items.filter((item) => item.state === 'waiting');
        for (const item of next.slice(0, Math.max(0, TOGETHER - busy))) {
            item.state = 'sending';
            this.send(item).then(() => this.pump());
        }
        if (busy === 0 && next.length === 0 && !this.reported) {
            this.report();
        }
        this.draw();
    }

    async send(item) {
        const begun = {}; // the round of this item: a new one begins when it is sent again
        item.round = begun;
        const off = () => item.state !== 'sending' || item.round !== begun;
        let asked = item.size <= SMALL;
        let failures = 0;
        let heard = performance.now();
        while (!off()) {
            const address = this.address;
            const part = item.file.slice(item.sent, asked ? item.sent + CHUNK : item.sent);
            const answer = await ask(item, 'PUT', `${address}/${item.id}`, {
                'Upload-Name': encodeURIComponent(item.name.toWellFormed?.() ?? item.name),
                'Upload-Length': String(item.size),
                'Upload-Offset': String(item.sent)
            }, part);
            if (off()) {
                return;
            }
            if (answer.status === 200) {
                if (!asked && !answer.done) {
                    this.report(); // what was chosen before is not all any more
                }
                failures = 0;
                heard = performance.now();
                asked = true;
                item.sent = answer.offset;
                item.why = '';
                if (answer.done) {
                    item.state = 'done';
                    item.name = answer.name;
                    this.reported = false;
                    this.say(`${shown(item.name)} is uploaded`);
                }
                continue;
            }
            const forgotten = answer.status === 404;
            const known = Number.isInteger(answer.offset);
            const away = [0, 408, 429, 502, 503, 504].includes(answer.status);
            if (!forgotten && !known && !away) {
                this.fail(item, answer.text || `The server answered ${answer.status}`);
                return;
            }
            if (performance.now() - heard > PATIENCE) {
                this.fail(item, 'The server does not answer');
                return;
            }
            if (answer.status === 0 && part.size && !await readable(part)) {
                this.fail(item, 'Your browser cannot read this any more: a folder, or changed since');
                return;
            }
            item.why = !away ? '' : answer.status === 429 ? 'Waiting for other uploads'
                : 'The connection is lost; going on when it is back';
            if (forgotten && address === this.address) {
                this.report(); // the page asks for a new inbox where the server has lost this one
            }
            this.draw();
            await sleep(PAUSES[Math.min(failures++, PAUSES.length - 1)]);
            if (off()) {
                return;
            }
            // Where it goes on. What the server does not know begins again, with a question first.
            let here = forgotten ? { status: 404 } : answer;
            if (!forgotten && !known) {
                here = await ask(item, 'GET', `${this.address}/${item.id}`, {});
                if (off()) {
                    return;
                }
            }
            if (Number.isInteger(here.offset)) {
                item.sent = here.offset;
            } else if (here.status === 404) {
                item.sent = 0;
                asked = item.size <= SMALL;
            }
        }
    }

    fail(item, why) {
        item.state = 'failed';
        item.why = why;
        this.reported = false;
        this.say(`${shown(item.name)} was not uploaded: ${why}`);
        this.draw();
    }

    take(item) {
        const was = item.state;
        this.items = this.items.filter((each) => each !== item);
        item.state = 'gone';
        item.request?.abort();
        if (was !== 'failed') {
            this.forget(item, was === 'done');
        } else {
            this.reported = false;
        }
        this.pump();
    }

    async forget(item, told) {
        await fetch(`${this.address}/${item.id}`, { method: 'DELETE' }).catch(() => null);
        if (told) {
            this.reported = false;
            this.pump();
        }
    }

    retry(item) {
        this.begin(item);
        this.pump();
    }

    // Tells the page that there is something new; a page that is not shown asks by itself.
    report() {
        if (this.view) {
            this.reported = true;
            const failed = this.items.filter((item) => item.state === 'failed');
            this.view.tell('changed', { at: Date.now(), failed: failed.map((item) => item.name) });
        }
    }

    // ------------------------------------------------------------------------------- showing

    mount(parent, tell) {
        const input = make('input', '');
        input.type = 'file';
        input.multiple = true;
        input.hidden = true;
        input.addEventListener('change', () => {
            this.choose([...input.files]);
            input.value = '';
        });
        const root = make('div', 'field');
        const zone = make('div', 'zone');
        const choose = button('choose', 'Choose files', '', () => input.click());
        const hint = make('span', 'hint');
        zone.append(choose, hint, input);
        const over = (event, on) => {
            if (event.dataTransfer?.types.includes('Files')) {
                event.preventDefault();
                zone.classList.toggle('over', on);
            }
        };
        root.addEventListener('dragenter', (event) => over(event, true));
        root.addEventListener('dragover', (event) => over(event, true));
        root.addEventListener('dragleave', (event) => {
            over(event, root.contains(event.relatedTarget));
        });
        root.addEventListener('drop', (event) => {
            over(event, false);
            this.choose([...event.dataTransfer.files]);
        });
        const label = make('div', 'label');
        const meaning = make('div', 'meaning');
        const rows = make('ul', 'rows');
        const total = make('div', 'total');
        const sum = make('span', 'far');
        const all = button('out', '×', 'Remove all of them', () => {
            for (const item of [...this.items]) {
                this.take(item);
            }
        });
        const tools = make('span', 'tools');
        tools.append(all);
        total.append(sum, tools);
        const said = make('div', 'said');
        said.setAttribute('role', 'status');
        root.append(label, zone, meaning, total, rows, said);
        parent.append(root);
        this.view = { tell, root, label, meaning, choose, hint, rows, total, sum, said,
            lines: new Map() };
    }

    unmount() {
        this.view?.root.remove();
        this.view = null;
    }

    update(data) {
        const moved = this.address && this.address !== data.address;
        this.address = data.address;
        this.data = data;
        const known = new Set(data.files.map((each) => each.id));
        if (moved) {
            // The server has lost the inbox, and every file in it.
            for (const item of this.items.filter((each) => each.file)) {
                item.request?.abort();
                this.begin(item);
            }
            this.items = this.items.filter((each) => each.file);
        } else {
            // What the server had and has no more.
            this.items = this.items.filter((each) => !each.known || known.has(each.id));
        }
        for (const each of data.files) {
            const own = this.items.find((item) => item.id === each.id);
            if (own) {
                own.known = true;
            } else {
                this.items.push({ ...each, file: null, known: true, state: 'done',
                    sent: each.size, flying: 0, why: '', request: null });
            }
        }
        const { view } = this;
        view.label.textContent = data.label;
        view.meaning.textContent = data.meaning;
        view.choose.setAttribute('aria-label', `Choose files: ${data.label}`);
        view.hint.textContent = `or drop them here · up to ${data.limit_text} each`;
        this.pump();
    }

    say(text) {
        if (this.view) {
            this.view.said.textContent = text;
        }
    }

    line(item) {
        const { view } = this;
        let line = view.lines.get(item);
        if (!line) {
            line = { root: make('li', 'row'), sign: make('span', 'sign'), name: make('bdi', 'name'),
                far: make('span', 'far'), bar: make('div', 'bar'), part: document.createElement('div'),
                why: make('div', 'why'), tools: make('span', 'tools') };
            line.sign.setAttribute('aria-hidden', 'true');
            line.bar.setAttribute('role', 'progressbar');
            line.bar.setAttribute('aria-valuemin', '0');
            line.bar.setAttribute('aria-valuemax', '100');
            line.bar.append(line.part);
            line.again = button('again', 'Try again', '', () => this.retry(item));
            line.out = button('out', '×', '', () => this.take(item));
            line.tools.append(line.again, line.out);
            line.root.append(line.sign, line.name, line.far, line.tools, line.bar, line.why);
            view.lines.set(item, line);
            view.rows.append(line.root);
        }
        return line;
    }

    draw() {
        window.clearTimeout(this.timer);
        const { view, items } = this;
        if (!view) {
            return;
        }
        const sum = (of) => of.reduce((total, item) => total + item.size, 0);
        const active = items.filter((item) => ['waiting', 'sending'].includes(item.state));
        const sent = items.reduce((total, item) => total + item.sent + item.flying, 0);
        const rest = active.reduce((left, item) => left + item.size - item.sent - item.flying, 0);
        const speed = this.speed(sent, active.length > 0);
        const pace = speed > 0
            ? ` · ${sized(Math.round(speed))}/s · ${lasting(rest / speed)} left` : '';
        const few = items.length <= ROWS;
        const picked = few ? items : items.filter((item) => ['failed', 'sending'].includes(item.state));
        const lines = new Set(picked.slice(0, ROWS));
        for (const [item, line] of view.lines) {
            if (!lines.has(item)) {
                line.root.remove();
                view.lines.delete(item);
            }
        }
        for (const item of lines) {
            const line = this.line(item);
            const far = item.sent + item.flying;
            line.root.className = `row ${item.state}`;
            line.sign.textContent = SIGNS[item.state];
            line.name.textContent = short(shown(item.name));
            line.name.title = shown(item.name);
            const size = sized(item.size);
            line.far.replaceChildren(item.state === 'sending' ? `${sized(far)} of ${size}` : size);
            if (item.state === 'sending' && items.length === 1) {
                line.far.append(pace); // else it stands beside the total
            }
            const share = item.size ? (100 * far) / item.size : 0;
            line.part.style.width = `${share}%`;
            line.bar.setAttribute('aria-valuenow', String(Math.floor(share)));
            line.bar.setAttribute('aria-label', shown(item.name));
            line.why.textContent = item.why;
            line.again.hidden = item.state !== 'failed' || !item.file;
            const act = ['waiting', 'sending'].includes(item.state) ? 'Cancel' : 'Remove';
            line.out.title = `${act} ${shown(item.name)}`;
            line.out.setAttribute('aria-label', line.out.title);
        }
        const done = items.filter((item) => item.state === 'done');
        const failed = items.filter((item) => item.state === 'failed').length;
        view.total.hidden = items.length < 2 || (few && active.length === 0);
        const of = active.length ? `${done.length} of ${counted(items.length)}` : counted(done.length);
        view.sum.textContent = `${of} · ${sized(sum(active.length ? items : done))}`
            + (failed ? ` · ${failed} not uploaded` : '') + (active.length ? pace : '');
        if (active.length) {
            this.timer = window.setTimeout(() => this.draw(), LOOK);
        }
    }

    // Bytes per second over the last seconds; 0 while it is not known.
    speed(sent, busy) {
        const now = performance.now();
        const last = this.marks.at(-1);
        if (!busy || (last && sent < last[1])) {
            this.marks = [];
        }
        if (busy) {
            this.marks.push([now, sent]);
        }
        while (this.marks.length > 2 && now - this.marks[0][0] > 3000) {
            this.marks.shift();
        }
        const first = this.marks[0];
        return first && now - first[0] > 400 ? (1000 * (sent - first[1])) / (now - first[0]) : 0;
    }
}

const readable = async (part) => {
    try {
        await part.slice(0, 1).arrayBuffer();
        return true;
    } catch {
        return false;
    }
};

const fields = new Map();

// A page that is closed takes what it has sent along.
window.addEventListener('pagehide', () => {
    for (const field of fields.values()) {
        if (field.items.length) {
            fetch(field.address, { method: 'DELETE', keepalive: true }).catch(() => null);
        }
    }
});

const mounted = new WeakMap();

export default function (component) {
    const { data, parentElement, setTriggerValue } = component;
    let field = fields.get(data.field);
    if (!field) {
        field = new Field(data.field);
        fields.set(data.field, field);
    }
    if (mounted.get(parentElement) !== field || !field.view) {
        field.unmount();
        field.mount(parentElement, setTriggerValue);
        mounted.set(parentElement, field);
    }
    field.view.tell = setTriggerValue;
    field.update(data);
    const { view } = field;
    // Called once, when the page takes the component off; another may be there already.
    return () => {
        view.root.remove();
        if (field.view === view) {
            field.view = null;
        }
    };
}
