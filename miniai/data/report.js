// What moves on the page of miniai.report: unpack, draw, choose a layer, read values, keep the place while live.
'use strict'
const $ = id => document.getElementById(id)
const root = document.documentElement
const css = nm => getComputedStyle(root).getPropertyValue(nm).trim()
const make = (tag, cls, text = '') => Object.assign(document.createElement(tag), {className: cls, textContent: text})

// ---- what is remembered: of this page in this tab, or of the theme in this browser
const place = `miniai ${location.pathname} `
const recall = (key, box = sessionStorage) => box.getItem(place + key)
const keep = (key, value, box = sessionStorage) => box.setItem(place + key, value)
const tried = f => { try { return f() } catch { return null } }   // storage may be forbidden

// ---- what the page carries
async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), c => c.charCodeAt(0))
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text()
}

async function loadLibrary() {
  const script = document.createElement('script')
  script.nonce = document.querySelector('script[nonce]').nonce   // the page's own policy lets no other script run
  script.textContent = await unpack('library')
  document.head.append(script)
}

// ---- names: the library reads markup in every text it is given, so all that is not ours goes through here
const plain = s => String(s).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;')
const short = (s, n = 24) => s.length <= n ? s : s.slice(0, n/2 - 1) + '…' + s.slice(-n/2)

// ---- a chart: the trace as the table has it, and what the library wants to see of it
function powers(values) {   // a scale of logarithms says the numbers they are of
  const logs = values.flat().filter(v => v > 0).map(Math.log10), low = logs.reduce((a, b) => Math.min(a, b), Infinity)
  if (!logs.length) return {}
  const high = logs.reduce((a, b) => Math.max(a, b), low), at = [0, 1, 2, 3, 4].map(i => low + i*(high - low)/4)
  return {tickvals: at, ticktext: at.map(v => v < -3 || v > 4 ? (10**v).toExponential(1) : String(+(10**v).toPrecision(2)))}
}

function mapTrace(t) {   // cells coloured by log, the values as they are on hover
  const shown = {log1p: v => v === null ? null : Math.log1p(v), log10: v => v > 0 ? Math.log10(v) : null,
                 none: v => v}[t.color]
  const values = t.values
  return {type: 'heatmap', name: plain(t.name), x: t.x, y: t.y, z: values.map(row => row.map(shown)), showscale: t.scale,
          customdata: values.map((row, i) => row.map(v => [plain(t.rows[i]), v === null ? 'nothing' : String(v)])),
          zmin: t.zmin, zmax: t.zmax, colorscale: 'Viridis', hoverongaps: false,
          colorbar: {thickness: 10, len: 1, outlinewidth: 0, ...(t.color === 'log10' ? powers(values) : {})},
          hovertemplate: `${plain(t.xname)} %{x}<br>${plain(t.yname)} %{customdata[0]}<br>${plain(t.name)} ` +
                         '%{customdata[1]}<extra></extra>'}
}

function lineTrace(t) {
  const color = css(`--c${t.color % 6}`), marks = t.mode === 'markers'
  return {type: 'scatter', name: plain(short(t.name, 40)), x: t.x, y: t.y, mode: t.mode, connectgaps: false,
          text: t.text || t.y.map(String), hovertemplate: '%{text}', showlegend: t.legend,
          line: {color, width: t.width || 1.6, dash: t.dash || 'solid'},
          marker: {color: marks ? css('--error') : color, size: marks ? 8 : 5, symbol: marks ? 'x' : 'circle'}}
}

const draw1 = t => t.kind === 'map' ? mapTrace(t) : lineTrace(t)

function guide(o) {
  return {type: 'line', xref: 'paper', x0: 0, x1: 1, y0: o, y1: o, line: {color: css('--muted'), width: 1, dash: 'dot'}}
}

function ticksOf(names) {   // a name at each place, or at every n-th where there are many
  const every = Math.ceil(names.length/25), at = names.map((_, i) => i).filter(i => i % every === 0)
  return {tickmode: 'array', tickvals: at, ticktext: at.map(i => plain(short(names[i], innerWidth < 600 ? 14 : 24)))}
}

function xAxis(chart) {
  const xs = chart.traces.flatMap(t => [t.x[0], t.x[t.x.length - 1]])
  if (chart.ticks?.length) return ticksOf(chart.ticks)
  return chart.xlabel === 'epoch' && Math.max(...xs) - Math.min(...xs) < 10 ? {dtick: 1} : {}
}

const touch = () => matchMedia('(pointer: coarse)').matches

function layoutOf(chart) {
  const axis = {gridcolor: css('--grid'), zerolinecolor: css('--grid'), linecolor: css('--line'), automargin: true,
                exponentformat: 'e', tickfont: {size: 11}}
  const label = {color: css('--fg'), size: 12}, map = chart.traces.find(t => t.kind === 'map')
  return {height: chart.height, margin: {l: 4, r: 10, t: 6, b: 4}, autosize: true, colorway: [css('--c0')],
          paper_bgcolor: css('--card'), plot_bgcolor: css('--card'), font: {color: css('--fg'), size: 12},
          hovermode: map ? 'closest' : 'x unified', hoverdistance: 60,
          hoverlabel: {bgcolor: css('--bg'), bordercolor: css('--line'), font: label, namelength: 40},
          dragmode: touch() ? false : 'zoom',   // a finger scrolls the page
          legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', font: label, bgcolor: 'rgba(0,0,0,0)'},
          xaxis: {...axis, title: {text: plain(chart.xlabel), font: label}, ...xAxis(chart),
                  unifiedhovertitle: {text: `${plain(chart.xlabel)} %{x}`}},
          yaxis: {...axis, title: {text: plain(chart.ylabel), font: label}, ...chart.yaxis,
                  ...(map && chart.named ? ticksOf(map.rows) : {})},
          shapes: (chart.guides || []).map(guide)}
}

const config = {responsive: true, typesetMath: false,   // a dollar sign in a name is no formula
                displaylogo: false, displayModeBar: touch() ? false : 'hover',
                modeBarButtons: [['zoom2d', 'pan2d', 'resetScale2d', 'toImage']]}

async function plot(box, chart) {
  await Plotly.react(box, chart.traces.map(draw1), layoutOf(chart), config)
}

const keys = 'Arrow keys, Page Up and Page Down, Home and End move from value to value.'

function addChart(place, chart) {
  const figure = make('figure', ''), box = make('div', 'plot'), readout = make('output', 'readout')
  box.tabIndex = 0
  box.setAttribute('role', 'application')
  box.setAttribute('aria-label', `${chart.title}. ${keys}`)
  readout.setAttribute('aria-live', 'polite')
  figure.append(make('h3', '', chart.title), box, readout, make('p', 'caption', chart.caption))
  place.append(figure)
  box.chart = chart
  return box
}

async function drawChart(box) {
  const chart = box.chart, readout = box.nextSibling
  await plot(box, chart)
  box.on('plotly_hover', e => { readout.textContent = told(chart, e.points[0]) })
  box.on('plotly_unhover', () => { readout.textContent = '' })
  box.addEventListener('keydown', e => walk(box, e))
  box.addEventListener('blur', () => Plotly.Fx.unhover(box))
}

function toldMap(t, row, at) { return `${t.xname} ${t.x[at]}, ${t.yname} ${t.rows[row]}: ${t.values[row][at] ?? 'nothing'}` }

function toldLines(chart, x) {   // of every line that has a value there
  const found = chart.traces.flatMap(t => { const i = t.x.indexOf(x); return i < 0 || t.y[i] === null ? [] :
                                                `${t.name} ${t.text ? t.text[i] : t.y[i]}` })
  return `${chart.xlabel} ${x}: ${found.join(', ')}`
}

function told(chart, p) {   // the values under the pointer, as text
  const trace = chart.traces[p.curveNumber]
  return trace.kind === 'map' ? toldMap(trace, ...p.pointNumber) : toldLines(chart, p.x)
}

// ---- values by keyboard
function walk(box, e) {
  const traces = box.chart.traces, map = traces.find(t => t.kind === 'map')
  const xs = map ? map.x : [...new Set(traces.flatMap(t => t.x))].sort((a, b) => a - b)
  const page = Math.max(1, Math.round(xs.length/10))
  const by = {ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page, Home: -xs.length, End: xs.length}[e.key]
  const up = map && {ArrowUp: 1, ArrowDown: -1}[e.key]
  if (!xs.length || e.ctrlKey || e.altKey || e.metaKey || by === undefined && !up) return
  e.preventDefault()
  const within = (i, n) => Math.min(Math.max(i, 0), n - 1)
  box.at = within(by === undefined ? box.at ?? 0 : (box.at ?? -1) + by, xs.length)
  if (map) box.row = within((box.row ?? 0) + (up || 0), map.y.length)
  if (map) Plotly.Fx.hover(box, [{curveNumber: traces.indexOf(map), pointNumber: [box.row, box.at]}], ['xy'])
  else Plotly.Fx.hover(box, {xval: xs[box.at]}, ['xy'])
  box.nextSibling.textContent = map ? toldMap(map, box.row, box.at) : toldLines(box.chart, xs[box.at])
}

// ---- groups of charts: those of the page, and those of the chosen layer
async function fill(place, charts) {
  for (const box of place.querySelectorAll('.plot')) Plotly.purge(box)
  place.replaceChildren()
  const boxes = charts.map(o => addChart(place, o))   // all of them first: they share the width
  for (const box of boxes) await drawChart(box)
  if (!charts.length) place.append(make('p', 'muted', place.dataset.empty))
}

async function fillSeen(place) {   // what is folded has no width to draw in; it is drawn when unfolded
  const folded = place.closest('details:not([open])'), charts = payload.charts[place.dataset.charts]
  if (!folded) return fill(place, charts)
  folded.addEventListener('toggle', () => fill(place, charts), {once: true})
}

let payload = null

async function choose(i, move) {
  const select = $('layer-choice')
  if (!select) return
  select.value = i = Math.min(Math.max(i, 0), select.options.length - 1)
  for (const row of document.querySelectorAll('tr[data-layer]')) row.classList.toggle('chosen', row.dataset.layer == i)
  tried(() => keep('layer', select.options[i].text))
  await fill($('layer-charts'), payload.layers[i])
  if (move) { $('layer').scrollIntoView(); select.focus({preventScroll: true}) }
}

function chosenBefore() {
  const names = [...($('layer-choice')?.options || [])].map(o => o.text)
  return Math.max(names.indexOf(tried(() => recall('layer')) || ''), 0)
}

// ---- themes
function setTheme(theme) {
  if (theme === 'system') delete root.dataset.theme
  else root.dataset.theme = theme
  tried(() => keep('theme', theme, localStorage))
  redraw()
}

function redraw() { if (window.Plotly) for (const box of document.querySelectorAll('.plot')) plot(box, box.chart) }

// ---- live: the page reads itself anew, and stands where it stood
const asleep = 20   // looks without anything new until the page stops looking

function leave() {
  keep('scroll', scrollY)
  keep('focus', document.activeElement?.id || '')
  keep('open', JSON.stringify([...document.querySelectorAll('details')].map(o => o.open)))
  location.reload()
}

function comeBack() {
  const open = JSON.parse(recall('open') || '[]')
  document.querySelectorAll('details').forEach((o, i) => { if (i in open) o.open = open[i] })
  $(recall('focus') || '-')?.focus({preventScroll: true})
  scrollTo(0, +recall('scroll') || 0)
}

function startLive() {
  const body = document.body, button = $('pause'), seconds = +body.dataset.live
  const same = recall('stamp') === body.dataset.stamp
  const looks = same ? +recall('looks') + 1 : 0
  keep('stamp', body.dataset.stamp)
  keep('looks', looks)
  const say = paused => { button.textContent = paused ? 'Go on' : 'Pause'; button.setAttribute('aria-pressed', paused) }
  say(recall('paused') === 'yes')
  button.onclick = () => { keep('paused', recall('paused') === 'yes' ? 'no' : 'yes'); keep('looks', 0)
                           say(recall('paused') === 'yes') }
  if (looks >= asleep) $('live-state').textContent = 'Nothing new for a while: reload the page to look again.'
  else setInterval(() => { if (recall('paused') !== 'yes' && !document.hidden) leave() }, 1000*seconds)
}

// ---- begin
async function begin() {
  const theme = tried(() => recall('theme', localStorage)) || 'system'
  $('theme').value = theme
  if (theme !== 'system') root.dataset.theme = theme
  $('theme').onchange = e => setTheme(e.target.value)
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw)
  await loadLibrary()
  payload = JSON.parse(await unpack('payload'))
  for (const place of document.querySelectorAll('[data-charts]')) await fillSeen(place)
  if ($('layer-choice')) {
    $('layer-choice').onchange = e => choose(+e.target.value)
    $('previous').onclick = () => choose(+$('layer-choice').value - 1)
    $('next').onclick = () => choose(+$('layer-choice').value + 1)
    for (const o of document.querySelectorAll('.pick')) o.onclick = () => choose(+o.dataset.layer, true)
    await choose(chosenBefore())
  }
  if (document.body.dataset.live) tried(() => { comeBack(); startLive() })
  root.dataset.drawn = 'yes'
}

begin().catch(e => {
  $('problem').hidden = false
  $('problem').append(` (${e})`)
})
