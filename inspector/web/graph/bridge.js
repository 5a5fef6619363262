// One graph pane: Netron's own view, driven by the page that holds the pane.
//
// This module takes the place of Netron's start script in a document of our own origin. It keeps
// Netron's host from asking, counting, storing and leading away, paints figures and marks on the
// nodes, and speaks with the page by messages. Names out of models are set as text only.

import { Host as BrowserHost } from './browser.js';
import { View } from './view.js';

const PANE = 'quant-inspector-pane';
const PAGE = 'quant-inspector-page';
const SVG = 'http://www.w3.org/2000/svg';
// The address of Netron's modules ends in /<version>/<module>.
const VERSION = window.location.pathname.split('/').at(-2);

const post = (message) => {
    window.parent.postMessage({ from: PANE, ...message }, window.location.origin);
};

let side = '';
let dead = false;
const fail = (message) => {
    dead = true;
    post({ type: 'failed', message: String(message || 'unknown error') });
};

window.addEventListener('error', (event) => fail(event.message));
window.addEventListener('unhandledrejection', (event) => {
    fail(event.reason && event.reason.message ? event.reason.message : event.reason);
});

// ---------------------------------------------------------------------- what we use of Netron

const HOST_METHODS = [
    'view', 'start', 'message', 'event', 'exception', 'export', 'get', 'set', 'delete', 'openURL',
    'execute', 'update', 'environment', '_openModel', '_setCookie', '_getCookie'
];
const VIEW_METHODS = [
    'start', 'show', 'refresh', 'render', 'export', 'pushTarget', 'popTarget', 'showNodeProperties'
];
const VIEW_VALUES = ['target', 'model', 'activeTarget', 'options'];
const ELEMENTS = ['target', 'sidebar', 'sidebar-closebutton', 'toolbar', 'logo-github'];

const missingAtStart = () => {
    const missing = [];
    for (const name of HOST_METHODS) {
        if (typeof BrowserHost.prototype[name] !== 'function') {
            missing.push(`Host.${name}`);
        }
    }
    for (const name of VIEW_METHODS) {
        if (typeof View.prototype[name] !== 'function') {
            missing.push(`View.${name}`);
        }
    }
    for (const name of VIEW_VALUES) {
        const found = Object.getOwnPropertyDescriptor(View.prototype, name);
        if (!found || typeof found.get !== 'function') {
            missing.push(`View.${name}`);
        }
    }
    for (const id of ELEMENTS) {
        if (!document.getElementById(id)) {
            missing.push(`element #${id}`);
        }
    }
    if (!sheetOfNodes()) {
        missing.push('grapher.css');
    }
    return missing;
};

const missingOfTarget = (target) => {
    const missing = [];
    for (const name of ['select', 'scrollTo', 'clearSelection']) {
        if (typeof target[name] !== 'function') {
            missing.push(`Graph.${name}`);
        }
    }
    for (const [name, kind] of [['nodes', Map], ['selection', Set], ['blocks', Set]]) {
        if (!(target[name] instanceof kind)) {
            missing.push(`Graph.${name}`);
        }
    }
    for (const name of ['zoom', '_width', '_height']) {
        if (typeof target[name] !== 'number') {
            missing.push(`Graph.${name}`);
        }
    }
    for (const id of ['canvas', 'origin']) {
        if (!document.getElementById(id)) {
            missing.push(`element #${id}`);
        }
    }
    const entry = target.nodes instanceof Map ?
        Array.from(target.nodes.values()).find((each) => each.label && isNode(each.label.value)) :
        null;
    if (entry) {
        const label = entry.label;
        for (const name of ['select', 'deselect']) {
            if (typeof label[name] !== 'function') {
                missing.push(`Node.${name}`);
            }
        }
        for (const name of ['width', 'height']) {
            if (typeof label[name] !== 'number') {
                missing.push(`Node.${name}`);
            }
        }
        if (!Array.isArray(label.blocks)) {
            missing.push('Node.blocks');
        }
        const element = label.element;
        if (!element) {
            missing.push('Node.element');
        } else {
            if (element.id !== `node-name-${label.value.name}`) {
                missing.push('element id node-name-<name>');
            }
            if (!element.querySelector(':scope > .node-item-type > path') ||
                !element.querySelector(':scope > .node-item-type > text')) {
                missing.push('a node\'s header .node-item-type with path and text');
            }
            if (!element.querySelector(':scope > .node.node-border')) {
                missing.push('a node\'s border .node-border');
            }
        }
    }
    return missing;
};

const changed = (missing) => {
    fail(`Netron's inside has changed, missing: ${missing.join(', ')}. ` +
        'Install the netron version that pyproject.toml names.');
};

// -------------------------------------------------------------------------------------- the host

class Host extends BrowserHost {

    constructor() {
        super();
        Object.assign(this._environment, { version: VERSION, packaged: false, menu: false });
        this._telemetry = { start() {}, set() {}, get() {}, send() {} };
        this._picture = null;
    }

    // No age check, no consent, no telemetry.
    async view(view) {
        this._view = view;
    }

    // No dropped files, no address of a file in the query: the page says what to load.
    async start() {
    }

    async message(text, alert) {
        if (alert) {
            fail(text);
            return 0;
        }
        if (text) {
            // "This may take long", with a button to cancel that we do not show: never answered.
            post({ type: 'slow' });
            return new Promise(() => {});
        }
        return undefined;
    }

    event(name, about) {
        if (name === 'graph_view' && about) {
            post({ type: 'drawing', nodes: about.graph_node_count });
        }
    }

    exception() {
    }

    async export(file, blob) {
        this._picture = blob;
    }

    takePicture() {
        const picture = this._picture;
        this._picture = null;
        return picture;
    }

    async execute() {
    }

    get() {
        return undefined;
    }

    set() {
    }

    delete() {
    }

    openURL() {
    }

    _setCookie() {
    }

    _getCookie() {
        return '';
    }
}

// ------------------------------------------------------------------------------------ stylesheets

// Colours go to the end of Netron's own stylesheet of nodes and not into the elements: its export
// writes the rules of that sheet, in their order, over the styles of every element. Rules of the
// dark theme stand in media rules, which the export passes over, so that a picture is light.
const sheetOfNodes = () => {
    return Array.from(document.styleSheets).find((each) => {
        return each.href && new URL(each.href).pathname.endsWith('/grapher.css');
    });
};

let netronRules = 0;
let theme = 'light';

const FIXED_RULES = [
    '.qi-calm > .node-item-type > path { fill: #ffffff; }',
    '.qi-calm > .node-item-type > text { fill: #334155; }',
    // The middle of the scale is grey as well: without a figure it is a pale one.
    '.qi-none > .node-item-type > path { fill-opacity: 0.3; }',
    // A hue that neither the scale nor a mark has.
    '.select > .node.node-border { stroke: #db2777; stroke-width: 3px; }',
    '.qi-outline { fill: none; pointer-events: none; stroke-width: 3px; }',
    '.qi-badge { pointer-events: none; }',
    '.qi-excluded { stroke: #7c3aed; stroke-dasharray: 8px, 4px; }',
    '.qi-unmatched { stroke: #71717a; stroke-dasharray: 1px, 4px; stroke-linecap: round; }',
    '.qi-float-again { stroke: #475569; }',
    '.qi-still-wrapped { stroke: #ea580c; stroke-dasharray: 12px, 3px, 3px, 3px; }',
    '.qi-worse-part { stroke: #2a59c0; }',
    '@media (prefers-color-scheme: dark) {' +
    ' .qi-calm > .node-item-type > path { fill: #1e293b; }' +
    ' .qi-calm > .node-item-type > text { fill: #cbd5e1; }' +
    ' .qi-none > .node-item-type > text { fill: #e4e4e7; }' +
    ' .select > .node.node-border { stroke: #f472b6; }' +
    ' .qi-excluded { stroke: #a78bfa; }' +
    ' .qi-unmatched { stroke: #a1a1aa; }' +
    ' .qi-float-again { stroke: #94a3b8; }' +
    ' .qi-worse-part { stroke: #6b93ee; }' +
    ' .qi-still-wrapped { stroke: #fb923c; } }'
];

const color = (value, otherwise) => {
    return /^#(?:[0-9a-f]{3}|[0-9a-f]{6})$/i.test(value) ? value : otherwise;
};

const setRules = (measure, noFigure) => {
    const sheet = sheetOfNodes();
    while (sheet.cssRules.length > netronRules) {
        sheet.deleteRule(sheet.cssRules.length - 1);
    }
    const fills = measure ? measure.colors.map((fill, at) => [`qi-${at}`, fill, measure.texts[at]]) : [];
    fills.push(['qi-none', noFigure, '#000000']);
    const rules = fills.flatMap(([name, fill, text]) => [
        `.${name} > .node-item-type > path { fill: ${color(fill, '#a1a1aa')}; }`,
        `.${name} > .node-item-type > text { fill: ${color(text, '#000000')}; }`
    ]);
    for (const rule of [...rules, ...FIXED_RULES]) {
        sheet.insertRule(rule, sheet.cssRules.length);
    }
    applyTheme();
};

// Netron follows the system's preference; we follow the page's: its media rules are switched.
const applyTheme = () => {
    for (const sheet of document.styleSheets) {
        for (const rule of sheet.cssRules) {
            if (rule instanceof CSSMediaRule &&
                (rule.quantInspector || /prefers-color-scheme/.test(rule.conditionText))) {
                rule.quantInspector = true;
                rule.media.mediaText = theme === 'dark' ? 'all' : 'not all';
            }
        }
    }
    document.documentElement.style.colorScheme = theme;
    document.documentElement.dataset.theme = theme;
};

const dress = () => {
    const style = document.createElement('style');
    style.textContent = `
        #menu, #menu-button, #logo, #titlebar, #open-file-dialog, #zoom-in-button, #zoom-out-button,
        #sidebar-model-button, #sidebar-target-button { display: none !important; }
        html body, html body .target { background-color: #ffffff; }
        html[data-theme="dark"] body, html[data-theme="dark"] body .target {
            background-color: #0f172a; }
        .target { scrollbar-width: thin; overscroll-behavior: contain; }
        .sidebar { max-width: 100%; }`;
    document.head.appendChild(style);
    // A click on an address of JavaScript is refused by the policy, with an error in the console.
    document.getElementById('sidebar-closebutton').removeAttribute('href');
    for (const link of document.querySelectorAll('#logo a')) {
        link.removeAttribute('href');
    }
};

// ---------------------------------------------------------------------------------- nodes by name

const isNode = (value) => {
    return Boolean(value && typeof value.name === 'string' && !Array.isArray(value.nodes) &&
        value.type && typeof value.type.name === 'string');
};

// name -> {name, label, graph}, of the graph that is drawn and of the bodies opened in it.
let drawn = new Map();
// element -> its label, of nodes and of the boxes of bodies.
let labels = new Map();

const collect = (graph) => {
    const visit = (label) => {
        if (label.element && label.value) {
            labels.set(label.element, label);
            if (isNode(label.value) && !drawn.has(label.value.name)) {
                drawn.set(label.value.name, { name: label.value.name, label, graph });
            }
        }
        for (const block of label.blocks || []) {
            if (block.target && block.target.nodes) {
                collect(block.target);
            }
            for (const item of block._items || []) {
                for (const content of Array.isArray(item.content) ? item.content : [item.content]) {
                    if (content && content.blocks) {
                        visit(content);
                    }
                }
            }
        }
    };
    for (const { label } of graph.nodes.values()) {
        visit(label);
    }
};

const bodies = (node) => {
    return (node.attributes || []).concat(node.blocks || []).flatMap((attribute) => {
        const values = Array.isArray(attribute.value) ? attribute.value : [attribute.value];
        return /^graph/.test(attribute.type || '') ?
            values.filter((value) => value && Array.isArray(value.nodes)) : [];
    });
};

const countNodes = (graph) => {
    return graph.nodes.reduce((sum, node) => {
        return sum + 1 + bodies(node).reduce((inner, body) => inner + countNodes(body), 0);
    }, 0);
};

// The bodies to open to see a node; null when it is not in the graph.
const wayTo = (graph, name) => {
    for (const node of graph.nodes) {
        if (node.name === name) {
            return [];
        }
        for (const body of bodies(node)) {
            const way = wayTo(body, name);
            if (way) {
                return [body, ...way];
            }
        }
    }
    return null;
};

// The node at a place of the picture, of nested ones the innermost; null beside all nodes.
const nodeAt = (place) => {
    let element = place.closest('g.graph-node');
    while (element) {
        const label = labels.get(element);
        if (label && isNode(label.value)) {
            return label.value;
        }
        element = element.parentElement && element.parentElement.closest('g.graph-node');
    }
    return null;
};

// Netron's own small buttons that open a body or a function.
const opensBody = (place) => {
    const element = place.closest('g.graph-node');
    const label = element && labels.get(element);
    return Boolean(label && [label.definition, label.expander].some((button) => {
        return button && button.element && button.element.contains(place);
    }));
};

// ---------------------------------------------------------------------------------------- figures

let sheet = null; // {measures, noFigure, nodes} of this side
let look = { measure: '', threshold: null, excluded: [], changed: {}, keys: [] };

const number = (value) => {
    if (typeof value === 'number') {
        return value;
    }
    const named = { Infinity, '-Infinity': -Infinity, NaN };
    return typeof value === 'string' && value in named ? named[value] : undefined;
};

const colorIndex = (measure, value) => {
    const reached = measure.steps.filter((step) => step <= value).length;
    if (Number.isNaN(value)) {
        return 0;
    }
    return measure.better === 'higher' ? reached : measure.steps.length - reached;
};

const betterThan = (measure, value, threshold) => {
    return measure.better === 'higher' ? value > threshold : value < threshold;
};

const HELPERS = new Set(['QuantizeLinear', 'DequantizeLinear']);

const lookOf = (name, measure, excluded) => {
    const about = sheet && Object.hasOwn(sheet.nodes, name) ? sheet.nodes[name] : null;
    if (!about) {
        return { fill: 'qi-none', marks: [], preview: false, tip: '' };
    }
    const partners = about.partners || [];
    const helper = HELPERS.has(about.op);
    const marks = [...(about.marks || [])];
    const names = side === 'float' ? [name] : (helper ? [] : partners);
    if (names.some((each) => excluded.has(each))) {
        marks.unshift('excluded');
    }
    const key = measure ? measure.key : '';
    let value = number((about.figures || {})[key]);
    // A quantized node shows the preview of the float node it stands for.
    const source = side === 'float' ? name : (helper || value === undefined ? '' : partners[0]);
    const changes = source && Object.hasOwn(look.changed, source) ? look.changed[source] : null;
    const previewed = changes ? number(changes[key]) : undefined;
    const preview = previewed !== undefined;
    if (preview) {
        value = previewed;
    }
    let fill = 'qi-none';
    if (measure && value !== undefined) {
        const limit = number(look.threshold);
        fill = limit !== undefined && betterThan(measure, value, limit) ?
            'qi-calm' : `qi-${colorIndex(measure, value)}`;
    }
    const lines = [about.tip || ''];
    if (preview) {
        const share = measure.unit === 'share';
        const shown = Number(((share ? 100 : 1) * value).toPrecision(4));
        lines.push(`Preview: ${measure.label} ${shown} ${share ? '%' : measure.unit}`);
    }
    if (marks[0] === 'excluded') {
        lines.push('On the list of nodes to leave in float');
    }
    return { fill, marks, preview, tip: lines.filter((line) => line).join('\n') };
};

const shape = (tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) {
        element.setAttribute(name, value);
    }
    if (text !== undefined) {
        element.textContent = text;
    }
    return element;
};

const CLASSES = {
    'excluded': 'qi-excluded',
    'unmatched': 'qi-unmatched',
    'float again': 'qi-float-again',
    'still wrapped': 'qi-still-wrapped',
    'worse part': 'qi-worse-part'
};
const BADGES = { 'unmatched': ['?', '#52525b'], 'still wrapped': ['\u25B2', '#c2410c'],
    'worse part': ['!', '#2a59c0'] };

// Drawn beside Netron's own shapes, so that its border stays free to show what is selected.
const drawMarks = (label, marks, preview) => {
    const group = shape('g', { class: 'qi-marks' });
    let outset = 3;
    let badges = 0;
    for (const mark of marks) {
        if (!Object.hasOwn(CLASSES, mark)) {
            continue;
        }
        group.appendChild(shape('rect', {
            class: `qi-outline ${CLASSES[mark]}`,
            x: -outset, y: -outset, rx: 5 + outset,
            width: label.width + 2 * outset, height: label.height + 2 * outset
        }));
        outset += 4;
        if (BADGES[mark]) {
            const [sign, fill] = BADGES[mark];
            const badge = shape('g', {
                class: 'qi-badge', transform: `translate(${label.width - 16 * badges}, 0)`
            });
            badge.appendChild(shape('circle', { r: 7, fill, stroke: '#ffffff' }));
            badge.appendChild(shape('text', {
                y: 3.5, fill: '#ffffff', 'text-anchor': 'middle', 'font-size': 9,
                'font-weight': 700, 'font-family': 'sans-serif'
            }, sign));
            group.appendChild(badge);
            badges += 1;
        }
    }
    if (preview) {
        const dot = shape('g', { class: 'qi-badge qi-preview' });
        dot.appendChild(shape('circle', { r: 5, fill: '#7c3aed', stroke: '#ffffff', 'stroke-width': 1.5 }));
        group.appendChild(dot);
    }
    return group;
};

const setTip = (element, tip) => {
    // The innermost title is shown, and Netron gives the header one of its own.
    for (const place of [element, element.querySelector(':scope > .node-item-type')]) {
        if (!place) {
            continue;
        }
        let title = place.querySelector(':scope > title');
        if (!title) {
            title = shape('title', {});
            place.prepend(title);
        }
        title.textContent = tip;
    }
};

let rulesFor = '';
const paint = () => {
    if (!sheet || drawn.size === 0) {
        return;
    }
    const begin = performance.now();
    const measure = sheet.measures.find((each) => each.key === look.measure) || null;
    const wanted = JSON.stringify([measure, sheet.noFigure]);
    if (rulesFor !== wanted) {
        setRules(measure, sheet.noFigure);
        rulesFor = wanted;
    }
    const excluded = new Set(look.excluded);
    for (const entry of drawn.values()) {
        const now = lookOf(entry.name, measure, excluded);
        const drawing = JSON.stringify([now.fill, now.marks, now.preview]);
        const element = entry.label.element;
        if (entry.drawing !== drawing) {
            entry.drawing = drawing;
            if (entry.fill) {
                element.classList.remove(entry.fill);
            }
            element.classList.add(now.fill);
            entry.fill = now.fill;
            if (entry.marks) {
                entry.marks.remove();
                entry.marks = null;
            }
            if (now.marks.length > 0 || now.preview) {
                entry.marks = drawMarks(entry.label, now.marks, now.preview);
                element.appendChild(entry.marks);
            }
        }
        const tip = now.tip ? `${entry.name}\n${now.tip}` : entry.name;
        if (entry.tip !== tip) {
            entry.tip = tip;
            setTip(element, tip);
        }
    }
    post({ type: 'painted', milliseconds: performance.now() - begin });
};

// -------------------------------------------------------------------------------------- selection

let selected = [];

const showSelection = () => {
    if (!view.target) {
        return;
    }
    view.target.clearSelection();
    for (const name of selected) {
        const entry = drawn.get(name);
        if (entry) {
            entry.label.select();
            entry.graph.selection.add(entry.label);
        }
    }
};

// Opens the bodies a node lies in; says whether it is drawn then.
const reveal = async (name) => {
    let way = wayTo(view.activeTarget, name);
    for (let up = 0; !way && up < 50; up++) {
        const before = view.activeTarget;
        await view.popTarget();
        if (view.activeTarget === before) {
            return false;
        }
        way = wayTo(view.activeTarget, name);
    }
    if (!way) {
        return false;
    }
    if (way.length > 0) {
        for (const body of way) {
            view.target.blocks.add(body);
        }
        await view.refresh();
    }
    return drawn.has(name);
};

let selections = 0;
const select = async ({ names, first, instant }) => {
    const mine = ++selections;
    selected = names;
    showSelection();
    if (!first || !view.target) {
        return;
    }
    if (!drawn.has(first) && !await reveal(first)) {
        post({ type: 'absent', name: first });
        return;
    }
    if (mine !== selections) {
        return; // another was asked for while a body was opened
    }
    showSelection();
    const element = drawn.get(first).label.element;
    view.target.scrollTo([element], instant ? 'instant' : 'smooth');
};

// ------------------------------------------------------------------------------------------- zoom

const zoom = ({ factor }) => {
    if (view.target) {
        view.target.zoom *= factor;
    }
};

const fit = () => {
    if (!view.target) {
        return;
    }
    const container = document.getElementById('target');
    view.target.zoom = Math.min(1, container.clientWidth / view.target._width);
    container.scrollLeft = (container.scrollWidth - container.clientWidth) / 2;
};

// ----------------------------------------------------------------------------------------- export

const CONTROLS = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g;

const picture = async ({ format, purpose }) => {
    try {
        // Netron copies the graph before the first pause of its export; what is selected now is
        // no part of the picture.
        view.target.clearSelection();
        const done = view.export(`graph.${format}`);
        showSelection();
        await done;
        let blob = host.takePicture();
        if (!blob) {
            throw new Error('Netron gave no picture');
        }
        if (format === 'svg') {
            const text = (await blob.text()).replace(CONTROLS, '\ufffd');
            blob = new Blob([text], { type: 'image/svg+xml' });
        }
        post({ type: 'picture', format, purpose, blob });
    } catch (error) {
        const reason = error && error.message ? error.message : 'the graph is too large';
        post({ type: 'no-picture', message: String(reason) });
    }
};

// ------------------------------------------------------------------------------- mouse and keys

const listen = () => {
    // This element stays; what is in it is made anew with every drawing. In the capturing phase,
    // because Netron opens its properties, which would cover the pane, at a single click.
    const area = document.getElementById('target');
    // Netron takes the focus after each drawing; who is writing elsewhere on the page keeps it.
    area.focus = () => {
        if (document.hasFocus()) {
            HTMLElement.prototype.focus.call(area);
        }
    };
    // By its own handling of the pointer a click would not give the pane the keys.
    area.addEventListener('pointerdown', () => {
        HTMLElement.prototype.focus.call(area, { preventScroll: true });
    }, true);
    area.addEventListener('click', (event) => {
        if (opensBody(event.target)) {
            return;
        }
        event.stopPropagation();
        const node = nodeAt(event.target);
        if (node) {
            const several = event.shiftKey || event.ctrlKey || event.metaKey;
            post({ type: 'clicked', name: node.name, several });
        }
    }, true);
    area.addEventListener('dblclick', (event) => {
        const node = opensBody(event.target) ? null : nodeAt(event.target);
        if (node) {
            event.stopPropagation();
            view.showNodeProperties(node, 'target');
        }
    }, true);
    area.addEventListener('contextmenu', (event) => {
        event.preventDefault();
        const node = nodeAt(event.target);
        if (node) {
            post({ type: 'toggled', name: node.name });
        }
    }, true);
    for (const name of ['dragover', 'drop']) {
        window.addEventListener(name, (event) => {
            event.preventDefault();
            event.stopPropagation();
        }, true);
    }
    window.addEventListener('keydown', (event) => {
        const typing = /^(?:input|textarea|select)$/i.test(event.target.tagName || '');
        if (typing || event.ctrlKey || event.metaKey) {
            return;
        }
        if (event.key === 'Escape' || event.key === 'Backspace') {
            // Netron's, for its properties; it drops the selection at every key.
            window.setTimeout(showSelection, 0);
            return;
        }
        event.stopPropagation();
        if (event.altKey) {
            return;
        }
        if (event.key === 'Enter') {
            const entry = drawn.get(selected[selected.length - 1]);
            if (entry && !/^(?:button|a)$/i.test(event.target.tagName || '')) {
                view.showNodeProperties(entry.label.value, 'target');
            }
        } else if (event.key === 'x') {
            post({ type: 'toggled', name: '' });
        } else if (look.keys.includes(event.key)) {
            event.preventDefault();
            post({ type: 'key', key: event.key });
        }
    }, true);
};

// ------------------------------------------------------------------------------------ the drawing

let host = null;
let view = null;
let known = null;
let begun = 0;

// Netron shows its page anew after each drawing: of the model, of a body, of an opened body.
const afterDrawing = () => {
    if (!view.target || view.target === known) {
        return;
    }
    known = view.target;
    drawn = new Map();
    labels = new Map();
    const missing = missingOfTarget(known);
    if (missing.length > 0) {
        changed(missing);
        return;
    }
    collect(known);
    if (sheet) {
        paint();
    }
    showSelection();
    const main = view.model.modules[0];
    post({
        type: 'drawn',
        nodes: countNodes(main),
        shown: drawn.size,
        milliseconds: performance.now() - begun
    });
};

const load = async ({ url, name }) => {
    const address = new URL(url, window.location.href);
    if (address.origin !== window.location.origin) {
        fail('The address of the graph is not of this server');
        return;
    }
    begun = performance.now();
    dead = false;
    known = null;
    selected = [];
    // The ending tells Netron what it reads.
    const status = await host._openModel(address.href, `${name}.onnx`);
    document.title = '';
    if (status !== '' && !dead) {
        fail('The graph cannot be read');
    } else if (!dead && !known) {
        fail('The graph has no nodes');
    }
};

const orders = {
    load,
    sheet: (message) => {
        sheet = { measures: message.measures, noFigure: message.noFigure, nodes: message.nodes };
        paint();
    },
    paint: (message) => {
        look = { ...look, ...message.look };
        paint();
    },
    theme: (message) => {
        theme = message.theme === 'dark' ? 'dark' : 'light';
        applyTheme();
    },
    select,
    zoom,
    fit,
    picture
};

const start = async () => {
    const missing = missingAtStart();
    if (missing.length > 0) {
        changed(missing);
        return;
    }
    netronRules = sheetOfNodes().cssRules.length;
    dress();
    setRules(null, '');
    host = new Host();
    view = new View(host);
    const show = view.show.bind(view);
    view.show = (page) => {
        show(page);
        if (!page || page === 'default') {
            afterDrawing();
        }
    };
    listen();
    await view.start();
    window.addEventListener('message', (event) => {
        const message = event.data;
        if (event.origin !== window.location.origin || event.source !== window.parent ||
            !message || message.from !== PAGE || !Object.hasOwn(orders, message.type)) {
            return;
        }
        if (message.side) {
            side = message.side;
        }
        orders[message.type](message);
    });
    post({ type: 'hello' });
};

start();
