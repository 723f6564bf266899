"""Looks: one accent, system fonts, light and dark, and a stylesheet for what is drawn by hand."""

import json
from collections.abc import Sequence
from importlib.resources import files

import gradio as gr
from gradio.themes.utils import sizes

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


# Of what lies around gradio's own frame, which its scoping keeps the stylesheet from.
HEAD = """<style>
.gradio-container, .gradio-container .main, .gradio-container .main > .wrap, main.contain { width: 100% !important }
.gradio-container .main, .gradio-container .main > .wrap, main.contain { min-width: 0; max-width: 100% !important }
.dark .gradio-container button[role=tab].selected, .dark button[role=tab].selected { color: #2dd4bf !important }
[data-stale], [data-unfound] { display: none !important }
.gradio-container input[type=range]::-webkit-slider-thumb { background: #0f766e !important }
.gradio-container input[type=range]::-moz-range-thumb { background: #0f766e !important }
.gradio-container .prose code { font-size: .95em !important; color: inherit !important }
.dark .gradio-container input[type=range] { --neutral-200: #33424f }
@media (max-width: 640px) {
.gradio-container .main { padding: 8px 10px !important }
.gradio-container .grid tbody th { position: static !important; min-width: 84px !important }
.gradio-container .grid tbody th { max-width: 104px !important }
.gradio-container .charts.wide .chart text { font-size: 13px !important }
}
</style>
<script>
// Where the user is stands in the address, so that a reload leads there again, and Back to where the user was.
window.equipoise = {
  at(changes, replace) {
    const address = new URL(location);
    for (const [key, value] of Object.entries(changes)) {
      if (value) address.searchParams.set(key, value);
      else address.searchParams.delete(key);
    }
    if (address.href === location.href) return;
    history[replace ? 'replaceState' : 'pushState'](null, '', address);
    this.shown = address.searchParams;
  },
  shown: new URL(location).searchParams,
  restore() {  // the tab; what is in it is restored by its own file
    const wanted = new URL(location).searchParams.get('tab') ?? 'Launch';
    for (const tab of document.querySelectorAll('#tabs button[role=tab]'))
      if (tab.textContent.trim() === wanted && tab.ariaSelected !== 'true') tab.click();
  },
  // What a form holds outlives a reload, in this browser's tab.
  kept: new Set(),
  keep(form, values) {
    const now = JSON.stringify(values), plan = document.getElementById('plan-' + form);
    if (plan.values_ !== now) plan.dataset.stale = '';  // a list of choices that comes late changes no value
    try {
      if (this.kept.has(form)) sessionStorage.setItem('equipoise ' + form, now);
    } catch {}  // full, or not allowed
  },
  checked(form, values) {
    const plan = document.getElementById('plan-' + form);
    plan.values_ = JSON.stringify(values);
    delete plan.dataset.stale;
  },
  // What is chosen once and for all outlives the tab, too.
  remember(name, value) {
    try { localStorage.setItem('equipoise ' + name, JSON.stringify(value)) } catch {}
  },
  remembered(name, value) {
    try { return JSON.parse(localStorage.getItem('equipoise ' + name)) ?? value } catch { return value }
  },
  filled(form, values) {
    this.kept.add(form);
    try {
      const before = JSON.parse(sessionStorage.getItem('equipoise ' + form));
      return before?.length === values.length ? before : values;
    } catch { return values }
  }
};
document.addEventListener('click', event => {
  const tab = event.target.closest('#tabs button[role=tab]')?.textContent.trim();
  if (TABS.includes(tab) && tab !== (equipoise.shown.get('tab') ?? 'Launch')) equipoise.at({tab});
});
document.addEventListener('keydown', event => {  // as in other programs' rows of tabs
  const tab = event.target.closest?.('button[role=tab]'), step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!tab || !step) return;
  const all = [...tab.parentElement.querySelectorAll('button[role=tab]')].filter(one => one.offsetParent);
  const next = all[(all.indexOf(tab) + step + all.length) % all.length];
  next.click();
  next.focus();
  event.preventDefault();
});
addEventListener('popstate', () => {
  const before = equipoise.shown, now = new URL(location).searchParams;
  equipoise.shown = now;
  if (['run', 'compare', 'made', 'pipeline'].some(key => before.get(key) !== now.get(key))) location.reload();
  else equipoise.restore();
});
</script>"""


def theme() -> gr.themes.Base:
    """The colours and sizes of gradio's own parts; the fonts are the system's, so that nothing is fetched."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0d1319",
        block_background_fill="white",
        block_background_fill_dark="#151d26",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="#263340",
        block_label_text_weight="600",
        block_title_text_weight="600",
        block_info_text_size="*text_sm",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        color_accent="*primary_700",
        slider_color="*primary_700",
        slider_color_dark="*primary_400",
        input_background_fill="white",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="#33424f",
        input_background_fill_dark="#0f161d",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_700",  # white words on it have a contrast of 5.5
        button_primary_background_fill_hover_dark="*primary_600",
    )


def head(tabs: Sequence[str]) -> str:
    """What the page has before its body. `tabs`: their names."""
    return f"{HEAD.replace('TABS', json.dumps(list(tabs)))}<script>{_file('page.js')}</script>"


def css() -> str:
    """The stylesheet."""
    return _file("style.css")


def _file(name: str) -> str:
    return files("equipoise.ui").joinpath(name).read_text(encoding="utf-8")
