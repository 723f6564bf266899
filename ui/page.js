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
