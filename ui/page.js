// What the page does without asking the server: pictures are zoomed together, curves read, lines hidden.
Object.assign(equipoise, {
  // Pictures: all in one `.zooms` are zoomed and moved together. The view is kept on the part that outlives their being
  // drawn anew, so that the next picture is seen at the same spot. x and y are shares of a picture's side.
  MOST: 16,
  held: new Map(),  // the pointers that are down, by id
  view(zooms) {
    const style = zooms.closest('.viewed').style, number = name => Number(style.getPropertyValue(name));
    return {zoom: number('--zoom') || 1, x: number('--x'), y: number('--y')};
  },
  look(zooms, {zoom, x, y}) {
    const within = (value, low, high) => Math.min(high, Math.max(low, value)), style = zooms.closest('.viewed').style;
    zoom = within(zoom, 1, this.MOST);
    style.setProperty('--zoom', zoom);
    style.setProperty('--x', within(x, 1 - zoom, 0));
    style.setProperty('--y', within(y, 1 - zoom, 0));
    zooms.closest('.viewed').classList.toggle('zoomed', zoom > 1);
  },
  zoom(zooms, factor, at = [.5, .5]) {  // what is at that spot stays there
    const before = this.view(zooms), zoom = Math.min(this.MOST, Math.max(1, before.zoom * factor));
    const kept = (moved, spot) => spot - (spot - moved) * zoom / before.zoom;
    this.look(zooms, {zoom, x: kept(before.x, at[0]), y: kept(before.y, at[1])});
  },
  move(zooms, right, down) {
    const {zoom, x, y} = this.view(zooms);
    this.look(zooms, {zoom, x: x + right, y: y + down});
  },
  spot(zooms, event) {
    const box = zooms.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  },
  keys: {'+': [1.25], '=': [1.25], '-': [.8], '0': [0], ArrowLeft: [1, .1, 0], ArrowRight: [1, -.1, 0],
    ArrowUp: [1, 0, .1], ArrowDown: [1, 0, -.1]},
});
document.addEventListener('wheel', event => {  // a trackpad's pinch comes as a wheel with Ctrl
  const zooms = event.target.closest?.('.zooms');
  if (!zooms || !(event.ctrlKey || zooms.contains(document.activeElement))) return;  // else the page is scrolled
  event.preventDefault();
  equipoise.zoom(zooms, Math.exp(-event.deltaY / 300), equipoise.spot(zooms, event));
}, {passive: false});
document.addEventListener('dblclick', event => {
  const zooms = event.target.closest?.('.zooms');
  if (zooms) equipoise.zoom(zooms, equipoise.view(zooms).zoom > 1 ? 0 : 3, equipoise.spot(zooms, event));
});
document.addEventListener('keydown', event => {
  const zooms = event.target.closest?.('.zooms'), step = equipoise.keys[event.key];
  if (!zooms || !step || event.ctrlKey || event.metaKey || event.altKey) return;
  if (step.length > 1 && equipoise.view(zooms).zoom === 1) return;  // there is nowhere to go: the page is scrolled
  event.preventDefault();
  step.length > 1 ? equipoise.move(zooms, step[1], step[2]) : equipoise.zoom(zooms, step[0]);
});
document.addEventListener('click', event => {
  const button = event.target.closest?.('button[data-zoom]');
  if (button) equipoise.zoom(button.closest('.viewed').querySelector('.zooms'), Number(button.dataset.zoom));
});
document.addEventListener('pointerdown', event => {
  const zooms = event.target.closest?.('.zooms');
  if (!zooms || event.button) return;
  if (event.pointerType === 'mouse') event.preventDefault();  // or the picture itself would be dragged
  zooms.focus({preventScroll: true});
  equipoise.held.set(event.pointerId, {zooms, at: equipoise.spot(zooms, event)});
});
document.addEventListener('pointermove', event => {
  const held = equipoise.held, mine = held.get(event.pointerId);
  if (!mine) return;
  if (!mine.zooms.isConnected) return void held.delete(event.pointerId);  // drawn anew under the pointer
  const {zooms, at} = mine, now = equipoise.spot(zooms, event);
  const other = [...held].find(([id, one]) => id !== event.pointerId && one.zooms === zooms)?.[1];
  if (other) {  // two fingers: the middle between them stays there
    const far = spot => Math.hypot(spot[0] - other.at[0], spot[1] - other.at[1]) || 1e-3;
    equipoise.zoom(zooms, far(now) / far(at), [(now[0] + other.at[0]) / 2, (now[1] + other.at[1]) / 2]);
  }
  const part = other ? .5 : 1;
  equipoise.move(zooms, part * (now[0] - at[0]), part * (now[1] - at[1]));
  mine.at = now;
});
for (const kind of ['pointerup', 'pointercancel'])
  document.addEventListener(kind, event => equipoise.held.delete(event.pointerId));

// Charts: what was measured under the pointer; lines hidden by their names; a range of steps, drawn over by the mouse or
// zoomed by keys and buttons.
// The server draws them anew as they grow: what was hidden or chosen is kept by run and title, and applied again.
const SVG = (name, attributes, text = '') => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
};
class Chart {
  static kept = new Map();  // run and title → {hidden: names, range: [first, last] or null}
  static shown = null;  // what is read: {name, at}, a chart's run and title and the step
  static focused = null;  // what has the keyboard's focus: {name, part}, a chart's run and title and which of `parts`
  constructor(figure) {
    this.figure = figure;
    this.svg = figure.querySelector('svg');
    this.plot = JSON.parse(this.svg.dataset.plot);
  }
  get name() {
    const run = document.querySelector('#run-head [data-shown]')?.dataset.shown ?? '';
    return `${run}|${this.figure.dataset.chart}`;
  }
  get state() {
    const {name} = this;
    if (!Chart.kept.has(name)) Chart.kept.set(name, {hidden: new Set(), range: null});
    return Chart.kept.get(name);
  }
  get range() { return this.state.range ?? [this.plot.first, this.plot.last] }
  lines(all = false) {  // with their points; `all`: those as they were measured, behind the smoothed ones, too
    return [...this.svg.querySelectorAll(all ? 'polyline' : 'polyline:not(.raw)')]
      .filter(line => !this.state.hidden.has(line.dataset.line))
      .map(line => {
        const text = line.dataset.values;
        if (line.read_?.text !== text)
          line.read_ = {text, points: text.split(' ').filter(Boolean).map(pair => pair.split(':').map(Number))};
        return {line, points: line.read_.points.filter(([x]) => x >= this.range[0] && x <= this.range[1])};
      });
  }
  across(x) {
    const {left, right} = this.plot, [first, last] = this.range;
    return left + (x - first) / (last - first || 1) * (right - left);
  }
  step(event) {
    const box = this.svg.getBoundingClientRect(), {left, right, width} = this.plot, [first, last] = this.range;
    const x = (event.clientX - box.left) / box.width * width;
    return first + (Math.min(right, Math.max(left, x)) - left) / (right - left) * (last - first);
  }
  scale(y) { return this.plot.log ? Math.log10(y) : y }
  down(y) {
    const {top, bottom} = this.plot, [low, high] = this.heights;
    return bottom - (this.scale(y) - low) / (high - low) * (bottom - top);
  }
  // The marks beside the axis are those of draw.marks and draw.labels on the server, in place of which they stand.
  static ticks(low, high) {
    const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * [1, 2, 5, 10].find(some => some * unit >= rough * .99), first = Math.ceil(low / step);
    return Array.from({length: Math.floor(high / step) - first + 1}, (_, n) => Number(((first + n) * step).toPrecision(12)));
  }
  marks() {
    const [low, high] = this.heights;
    if (!this.plot.log) return Chart.ticks(low, high);
    const first = Math.floor(low), decades = Array.from({length: Math.ceil(high) - first + 1}, (_, n) => first + n);
    const every = Math.max(1, Math.floor((high - low) / 4 + .5));
    for (const digits of [[1], [1, 3], [1, 2, 5]]) {
      const found = decades.filter(n => n % every === 0).flatMap(n => digits.map(digit => Number(`${digit}e${n}`)))
        .filter(value => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9);
      if (found.length > 2) return found;
    }
    return Chart.ticks(10 ** low, 10 ** high).map(value => Number(value.toPrecision(3)));
  }
  static short(value, digits = 4) {
    const [number, ten] = value.toExponential(digits - 1).split('e').map(Number);
    return ten < -4 || ten >= digits ? `${number}e${ten}` : String(Number(value.toPrecision(digits)));
  }
  static labels(values, log) {  // [value, words]: as draw.labels
    const plain = values.map(value => Chart.short(value)), all = log && plain.some((words, n) => words.includes('e') || values[n] < 1e-3);
    return values.map((value, n) => [value, all ? Number(value.toPrecision(4)).toExponential().replace('+', '') : plain[n]]);
  }
  apply(changed) {  // lays out anew what is not as the server drew it
    const {hidden, range} = this.state;
    this.plot = JSON.parse(this.svg.dataset.plot);
    for (const button of this.figure.querySelectorAll('button[data-line]'))
      button.setAttribute('aria-pressed', String(!hidden.has(button.dataset.line)));
    for (const part of this.svg.querySelectorAll('[data-line]'))
      part.style.display = hidden.has(part.dataset.line) ? 'none' : '';
    if (hidden.size || range || changed) this.layout();
  }
  layout() {
    const shown = this.lines(true), values = shown.flatMap(one => one.points.map(([, y]) => this.scale(y)));
    let low = Math.min(...values), high = Math.max(...values);
    if (!values.length) [low, high] = [this.plot.low, this.plot.high];
    if (high - low <= 1e-4 * (this.plot.log ? 1 : Math.max(Math.abs(low), Math.abs(high))))
      [low, high] = [low - (Math.abs(low) || 1) * .05, high + (Math.abs(high) || 1) * .05];
    this.heights = [low, high];
    const marks = Chart.labels(this.marks(), this.plot.log), {letter, least} = this.plot;
    this.plot.left = Math.max(least, letter * Math.max(0, ...marks.map(([, words]) => words.length)) + 14);
    for (const {line, points} of shown) {
      line.setAttribute('points', points.map(([x, y]) => `${this.across(x).toFixed(1)},${this.down(y).toFixed(1)}`).join(' '));
      const dot = line.matches('.raw') ? null : this.svg.querySelector(`circle[data-line="${CSS.escape(line.dataset.line)}"]`);
      if (dot && points.length) {
        dot.setAttribute('cx', this.across(points.at(-1)[0]));
        dot.setAttribute('cy', this.down(points.at(-1)[1]));
      }
      if (dot) dot.style.display = points.length ? '' : 'none';
    }
    for (const old of this.svg.querySelectorAll('.rule, .beside, .below')) old.remove();
    const {left, right, height} = this.plot, drawn = [];
    for (const [value, words] of marks) {
      const y = this.down(value);
      drawn.push(SVG('line', {class: 'rule', x1: left, x2: right, y1: y, y2: y}));
      drawn.push(SVG('text', {class: 'beside', x: left - 6, y: y + 4, 'text-anchor': 'end'}, words));
    }
    this.range.forEach((x, end) => drawn.push(
      SVG('text', {class: 'below', x: end ? right : left, y: height - 8, 'text-anchor': end ? 'end' : 'start'}, String(x))
    ));
    this.svg.prepend(...drawn);
  }
  choose(range) {  // of steps; null: all of them
    this.state.range = range && [Math.round(Math.min(...range)), Math.round(Math.max(...range))];
    if (this.state.range && this.state.range[0] === this.state.range[1]) this.state.range = null;
    this.leave();
    this.apply(true);
  }
  zoom(factor) {  // around what is read, or the middle; 0: all steps
    const {first, last} = this.plot, [from, to] = this.range, width = (to - from) / factor;
    const read = Chart.shown?.name === this.name, at = read ? this.at : (from + to) / 2;
    const start = Math.min(last - width, Math.max(first, at - (at - from) / factor));
    if (!(width < last - first)) this.choose(null);
    else if (width >= 1) this.choose([start, start + width]);
    if (read) this.read(at);
  }
  toggle(name) {
    const {hidden} = this.state;
    if (!hidden.delete(name)) hidden.add(name);
    this.leave();
    this.apply(true);
  }
  steps() { return [...new Set(this.lines().flatMap(one => one.points.map(([x]) => x)))].sort((a, b) => a - b) }
  read(near) {  // says what every line has at the step nearest to this one
    const steps = this.steps();
    this.leave();
    if (!steps.length) return;
    const at = steps.reduce((a, b) => Math.abs(b - near) < Math.abs(a - near) ? b : a);
    const found = this.lines().filter(one => one.points.length).map(({line, points}) => [
      line, points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)
    ]).sort((a, b) => b[1][1] - a[1][1]);
    const {left, right, top, bottom} = this.plot, x = this.across(at);
    this.svg.append(SVG('line', {class: 'reading', x1: x, x2: x, y1: top, y2: bottom}));
    const tip = document.createElement('div'), head = document.createElement('b');
    tip.className = 'tip';
    tip.setAttribute('role', 'status');
    head.textContent = `step ${at}`;
    tip.append(head);
    for (const [line, [step, value]] of found) {
      const row = document.createElement('span'), ink = document.createElement('i');
      ink.style.background = line.style.stroke;
      const words = `${line.dataset.line} ${Chart.short(value, 5)}${step === at ? '' : ` (step ${step})`}`;
      row.append(ink, words);
      tip.append(row);
    }
    const share = x / this.plot.width;
    tip.style[share < .5 ? 'left' : 'right'] = `${(share < .5 ? share : 1 - share) * 100 + 3}%`;
    this.figure.append(tip);
    this.at = at;
    Chart.shown = {name: this.name, at};
  }
  leave() {
    if (Chart.shown?.name === this.name) Chart.shown = null;
    this.figure.querySelectorAll('.tip, .reading').forEach(one => one.remove());
  }
  static of(target) {
    const figure = target.closest?.('figure.chart[data-chart]');
    if (!figure) return null;
    if (figure.chart_?.svg.isConnected) return figure.chart_;
    return figure.chart_ = new Chart(figure);
  }
  static named(name) {  // what is drawn of it now
    return [...document.querySelectorAll('figure.chart[data-chart]')].map(Chart.of).find(one => one.name === name);
  }
  get parts() { return [...this.figure.querySelectorAll('svg, button')] }
  static focus(target) {
    const chart = Chart.of(target), part = chart?.parts.indexOf(target.closest('svg, button')) ?? -1;
    Chart.focused = part < 0 ? null : {name: chart.name, part};
  }
  static restore(grown) {  // what was read, and the focus, in a chart that the server has drawn anew
    const {shown, focused} = Chart, chart = shown && Chart.named(shown.name);
    if (chart && (grown || !chart.figure.querySelector('.tip'))) chart.read(shown.at);
    if (focused && document.activeElement === document.body)
      Chart.named(focused.name)?.parts[focused.part]?.focus({preventScroll: true});
  }
}
equipoise.charts = element => {  // what holds charts: gradio changes its parts in place, and so what was done to them
  const watched = {childList: true, subtree: true, attributes: true, attributeFilter: ['data-values', 'points', 'aria-pressed']};
  const watcher = new MutationObserver(changes => {
    watcher.disconnect();  // what is done here is no news
    element.querySelectorAll('figure.chart[data-chart]').forEach(one => Chart.of(one).apply(false));
    Chart.restore(changes.some(one => one.attributeName === 'data-values'));
    watcher.observe(element, watched);
  });
  watcher.observe(element, watched);
};
{
  let drawn = null;  // the range that is being drawn over a chart: {name, from, x}; the chart may be another by its end
  const leaveOthers = event => document.querySelectorAll('figure.chart:has(.tip)')
    .forEach(one => one.contains(event.target) || Chart.of(one).leave());
  const chartAt = event => event.target.closest?.('figure.chart svg') && Chart.of(event.target);
  document.addEventListener('pointermove', event => {
    const chart = chartAt(event);
    leaveOthers(event);
    if (!chart) return;
    chart.read(chart.step(event));
    if (drawn?.name !== chart.name) return;
    chart.svg.querySelector('.drawn')?.remove();
    const [a, b] = [drawn.from, chart.step(event)].map(step => chart.across(step)), {top, bottom} = chart.plot;
    chart.svg.append(SVG('rect', {class: 'drawn', x: Math.min(a, b), width: Math.abs(b - a), y: top, height: bottom - top}));
  });
  document.addEventListener('pointerdown', event => {
    const chart = chartAt(event);
    Chart.focus(event.target);
    if (chart) chart.read(chart.step(event));  // a finger that taps does not move
    leaveOthers(event);
    if (chart && !event.button && event.pointerType === 'mouse')
      drawn = {name: chart.name, from: chart.step(event), x: event.clientX};
  });
  document.addEventListener('pointerup', event => {
    const {name, from, x} = drawn ?? {}, chart = drawn && Chart.named(name);
    drawn = null;
    chart?.svg.querySelector('.drawn')?.remove();
    if (chart && Math.abs(event.clientX - x) > 8) chart.choose([from, chart.step(event)]);
  });
  document.addEventListener('pointercancel', () => drawn = null);
  document.addEventListener('focusin', event => Chart.focus(event.target));
  document.addEventListener('dblclick', event => chartAt(event)?.choose(null));
  document.addEventListener('click', event => {
    const button = event.target.closest?.('figure.chart button');
    if (button?.dataset.line) Chart.of(button).toggle(button.dataset.line);
    if (button?.dataset.steps) Chart.of(button).zoom(Number(button.dataset.steps));
  });
  document.addEventListener('keydown', event => {
    const chart = chartAt(event), step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    const factor = {'+': 2, '=': 2, '-': .5, '0': 0}[event.key];
    if (!chart || (!step && factor === undefined) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!step) return chart.zoom(factor);
    const steps = chart.steps(), before = steps.indexOf(chart.at);
    chart.read(steps[Math.min(steps.length - 1, Math.max(0, before < 0 ? 0 : before + step))]);
  });
}

// What is wrong with a form stands at its fields, too, as long as it is said and they are not edited.
equipoise.faults = element => {
  const lift = field => {
    field.querySelectorAll('.fault').forEach(one => one.remove());
    field.querySelectorAll('[aria-invalid]').forEach(one => one.removeAttribute('aria-invalid'));
  };
  const found = () => [...element.querySelectorAll('li[data-field]')];
  const place = () => {
    for (const line of found()) {
      const field = document.getElementById(line.dataset.field);
      const box = field?.closest('.rest')?.querySelector('.seek input');
      if (box?.value) {  // the field may be one that was not searched for
        box.value = '';
        box.dispatchEvent(new Event('input', {bubbles: true}));
      }
      if (!field || [...field.querySelectorAll('.fault')].some(one => one.textContent === line.textContent)) continue;
      const fault = document.createElement('p');
      fault.className = 'fault';
      fault.id = `${field.id}-fault`;
      fault.textContent = line.textContent;
      field.append(fault);
      for (const input of field.querySelectorAll('input, textarea')) {
        input.setAttribute('aria-invalid', 'true');
        input.setAttribute('aria-describedby', fault.id);
      }
    }
  };
  const isThere = () => found().every(line => document.getElementById(line.dataset.field));
  new MutationObserver(() => {
    document.querySelectorAll('.fault').forEach(one => lift(one.parentElement));
    place();
    if (isThere()) return;
    // fields that are folded up are drawn when they are opened
    const fold = [...document.querySelectorAll('button.label-wrap')]
      .find(one => one.offsetParent && one.textContent.includes('Everything else'));
    if (fold && !fold.classList.contains('open')) fold.click();
    for (let wait = 100; wait < 2000; wait *= 2) setTimeout(place, wait);
  }).observe(element, {childList: true, subtree: true, attributes: true, characterData: true});
  element.addEventListener('click', event => {
    const id = event.target.closest('li[data-field]')?.dataset.field, field = id && document.getElementById(id);
    field?.scrollIntoView({block: 'center'});
    field?.querySelector('input, textarea')?.focus({preventScroll: true});
  });
  document.addEventListener('input', event => {
    const field = event.target.closest?.('[id^="field-"]');
    if (field) lift(field);
  });
};

// Of the fields of a form that stand under "Everything else", those are shown whose words hold all that are searched for.
equipoise.seek = (rest, text) => {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const section of rest.querySelectorAll('.section')) {
    const head = section.querySelector('h4')?.textContent ?? '', fields = [...section.querySelectorAll('[id^="field-"]:not(.fault)')];
    const found = fields.filter(field => {
      const about = `${head} ${field.textContent}`.toLowerCase(), isFound = words.every(word => about.includes(word));
      field.toggleAttribute('data-unfound', !isFound);
      return isFound;
    });
    section.toggleAttribute('data-unfound', !found.length);
    count += found.length;
  }
  return words.length ? `${count} found` : '';
};
document.addEventListener('input', event => {
  const box = event.target.closest?.('.seek input');
  if (box) box.parentElement.querySelector('[role=status]').textContent = equipoise.seek(box.closest('.rest'), box.value);
});

// What an entry of a list is for stands below its name; and what a chip's cross takes away is said by its name, not its place.
new MutationObserver(() => {
  for (const cross of document.querySelectorAll('.token-remove')) {
    const label = `Remove ${cross.parentElement.textContent.trim()}`;
    if (!/^Remove \d+$/.test(cross.title || cross.ariaLabel || '') || cross.ariaLabel === label) continue;
    cross.title = cross.ariaLabel = label;
  }
  const entries = document.querySelectorAll('ul[role=listbox] li[role=option]'), part = document.querySelector('#purposes');
  if (!entries.length || !part) return;
  const words = part.words_ ??= JSON.parse(part.dataset.words);
  for (const entry of entries) {
    const about = words[entry.closest('[id^="field-"], [id^="preset-"]')?.id]?.[entry.ariaLabel] ?? '';
    if ((entry.dataset.purpose ?? '') === about) continue;  // what is written here is no news
    entry.dataset.purpose = entry.ariaDescription = about;
  }
}).observe(document, {childList: true, subtree: true, attributes: true, attributeFilter: ['aria-label', 'title']});

// A folder that is dropped on an upload is walked through: browsers hand over its files one by one.
equipoise.files = async entry => {
  if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
  const reader = entry.createReader(), found = [];
  for (;;) {  // a reader gives a hundred at a time
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.filter(one => !one.name.startsWith('.')).map(equipoise.files))).flat();
};
document.addEventListener('drop', async event => {
  const input = event.target.closest?.('#pictures')?.querySelector('input[type=file]');
  const entries = [...event.dataTransfer?.items ?? []].map(item => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!input || !entries.some(one => one.isDirectory)) return;  // gradio takes files by itself
  event.preventDefault();
  event.stopImmediatePropagation();
  const files = (await Promise.all(entries.map(equipoise.files))).flat(), chosen = new DataTransfer();
  for (const file of files) if (/\.(png|jpe?g|webp|txt|zip)$/i.test(file.name)) chosen.items.add(file);
  input.files = chosen.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
}, true);
