// The page of miniai.report: unpack the charts, draw them where they are seen, read values by pointer or keyboard.
'use strict'
const $ = id => document.getElementById(id)
const all = (css, within = document) => [...within.querySelectorAll(css)]
const root = document.documentElement, touch = matchMedia('(pointer: coarse)').matches
let charts = {}

function remember(key, value) {   // of this page in this tab, the theme in this browser; storage may be forbidden
  try {
    const box = key === 'theme' ? localStorage : sessionStorage, name = `miniai ${location.pathname} ${key}`
    return value === undefined ? box.getItem(name) : box.setItem(name, value)
  } catch { return null }
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), c => c.charCodeAt(0))
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text()
}

async function loadPlotly() {   // the page's own policy lets no script run but those that have its mark
  const script = document.createElement('script')
  script.nonce = document.querySelector('script[nonce]').nonce
  script.textContent = await unpack('plotly')
  document.head.append(script)
}

// ---- charts
const image = {name: 'toImage', title: 'Download plot as a PNG', icon: {}, click: box => Plotly.downloadImage(   // with a legend
  {data: box.data, layout: {...box.layout, showlegend: true}}, {format: 'png', width: box.offsetWidth, height: box.offsetHeight + 60})}
const config = {responsive: true, displaylogo: false, typesetMath: false, displayModeBar: touch ? false : 'hover',
                modeBarButtons: [['zoom2d', 'pan2d', 'resetScale2d', image]]}

async function draw(place) {
  for (const o of all('.plot', place)) Plotly.purge(o)
  const found = charts[place.dataset.charts] || []
  place.replaceChildren(...(found.length ? found.map(frame) : [empty(place)]))
  for (const box of all('.plot', place)) await plot(box)   // all frames first: they share the width
}

const empty = place => Object.assign(document.createElement('p'), {className: 'muted', textContent: place.dataset.empty})

function frame(chart) {
  const figure = $('frame').content.firstElementChild.cloneNode(true), [title, legend, box, , caption] = figure.children
  title.textContent = chart.title
  caption.textContent = chart.caption
  box.setAttribute('aria-label', `${chart.title}. Arrow keys, Page Up and Down, Home and End move from value to value.`)
  Object.assign(box, {chart, off: new Set()})
  legend.replaceChildren(...chart.figure.data.filter(t => t.showlegend).map(t => key(box, t)))
  return figure
}

function key(box, trace) {   // a line's entry in the legend: a button that hides it
  const button = Object.assign(document.createElement('button'), {type: 'button', className: 'key', textContent: trace.meta})
  const swatch = document.createElement('span'), {color, dash} = trace.line
  const style = {dash: 'dashed', dot: 'dotted'}[dash] ?? 'solid'
  swatch.style.borderTop = `3px ${style} ${color}`
  button.prepend(swatch)
  button.setAttribute('aria-pressed', 'true')
  button.onclick = () => {
    box.off.delete(trace.meta) || box.off.add(trace.meta)
    button.setAttribute('aria-pressed', !box.off.has(trace.meta))
    redraw(box)
  }
  return button
}

function smooth(y, beta) {   // gaps stay gaps; the first values are means of fewer
  let sum = 0, weight = 0
  return y.map(v => v === null ? null : (sum = beta*sum + (1-beta)*v, weight = beta*weight + 1-beta, sum/weight))
}

function traces(box) {   // what is drawn: without hidden lines, and where they are smoothed those of the values behind, faint
  const beta = box.closest('[data-charts=curves]') ? +$('smoothing').value : 0
  return box.chart.figure.data.flatMap(t => {
    const own = {...t, visible: !box.off.has(t.meta)}, {scale} = box.chart
    if (scale) return [{...own, customdata: t.z, z: t.z.map(row => row.map((v, i) => v*scale[i])), hovertemplate: t.hovertemplate.replace('%{z', '%{customdata')}]
    if (!beta || t.type !== 'scatter' || t.mode === 'markers' || t.x.length < 10) return [own]
    return [{...own, opacity: .25, hoverinfo: 'skip', showlegend: false}, {...own, y: smooth(t.y, beta)}]
  })
}

const layoutOf = box => ({...box.chart.figure.layout, showlegend: false, uirevision: 'keep', dragmode: touch ? false : 'zoom'})   // a finger scrolls the page
const redraw = box => Plotly.react(box, traces(box), layoutOf(box), config)

function setSmoothing(value) {
  $('smoothing').value = value
  $('smoothed').textContent = +value ? value : 'off'
  remember('smoothing', value)
}

async function plot(box) {
  image.icon = Plotly.Icons.camera
  await Plotly.newPlot(box, traces(box), layoutOf(box), config)
  box.on('plotly_hover', e => show(box, e.points[0].x, e.points[0].pointNumber))
  box.on('plotly_unhover', () => show(box))
  box.onkeydown = e => walk(box, e)
  box.onblur = () => { if (box.data) Plotly.Fx.unhover(box) }
}

const isMap = box => box.data[0]?.type === 'heatmap'
const beside = box => all('.plot', box.closest('.charts')).filter(o =>   // curves of a group have one cursor
  o !== box && o.data && !isMap(o) && !isMap(box) && o.chart.xlabel === box.chart.xlabel)

function show(box, x, at) {   // say the values at x, and put the cursor of the other curves there
  for (const o of beside(box)) x === undefined ? Plotly.Fx.unhover(o) : Plotly.Fx.hover(o, {xval: x}, ['xy'], true)
  const told = x === undefined ? [] : isMap(box) ? [cell(box, ...at)] : box.data.filter(t => t.visible !== false && t.hoverinfo !== 'skip').flatMap(t => {
    const i = t.x.indexOf(x)
    return i < 0 || t.y[i] === null ? [] : [`${t.meta} ${t.text?.[i] ?? +t.y[i].toPrecision(9)}`]
  })
  box.nextElementSibling.textContent = told.length ? `${box.chart.xlabel} ${x}${isMap(box) ? ', ' : ': '}${told.join(', ')}` : ''
}

function cell(box, row, column) {
  const {meta, customdata, z} = box._fullData[0], value = (customdata ?? z)[row][column]
  return `${box.layout.yaxis.title.text} ${meta[row]}: ${value ?? 'nothing'}`.trim()
}

function walk(box, e) {
  const map = isMap(box), xs = map ? box.data[0].x : [...new Set(box.data.flatMap(t => t.x))].sort((a, b) => a - b)
  const page = Math.max(1, Math.round(xs.length/10)), within = (i, n) => Math.min(Math.max(i, 0), n - 1)
  const by = {ArrowLeft: -1, ArrowRight: 1, PageUp: -page, PageDown: page, Home: -xs.length, End: xs.length}[e.key]
  const up = map && {ArrowUp: 1, ArrowDown: -1}[e.key]
  if (!xs.length || e.ctrlKey || e.altKey || e.metaKey || by === undefined && !up) return
  e.preventDefault()
  box.at = within(by === undefined ? box.at ?? 0 : (box.at ?? -1) + by, xs.length)
  if (map) box.row = within((box.row ?? 0) + (up || 0), box.data[0].y.length)
  Plotly.Fx.hover(box, map ? [{curveNumber: 0, pointNumber: [box.row, box.at]}] : {xval: xs[box.at]}, ['xy'], true)
  show(box, xs[box.at], [box.row, box.at])
}

// ---- one layer
async function choose(i, move) {
  const select = $('layer-choice')
  if (!select) return
  select.value = i
  for (const row of all('tr[data-layer]')) row.classList.toggle('chosen', row.dataset.layer === select.value)
  remember('layer', select.selectedOptions[0].text)
  $('layer-charts').dataset.charts = `layer ${i}`
  await draw($('layer-charts'))
  if (move) { $('layer').scrollIntoView(); select.focus({preventScroll: true}) }
}

function firstChoice() {   // the one before the page was read anew, or the first finding's
  const select = $('layer-choice'), names = select ? [...select.options].map(o => o.text) : []
  const before = names.indexOf(remember('layer'))
  return before < 0 ? select?.dataset.first : before
}

// ---- live: the page reads itself anew, and stands where it stood
function live(seconds) {
  const show = () => { $('pause').textContent = remember('paused') ? 'Go on' : 'Pause' }
  $('pause').onclick = () => { remember('paused', remember('paused') ? '' : 'yes'); show() }
  show()
  const {scroll, focus, open} = JSON.parse(remember('place') || '{}')
  all('details').forEach((o, i) => { o.open = open?.[i] ?? o.open })
  $(focus || '-')?.focus({preventScroll: true})
  scrollTo(0, scroll || 0)
  setInterval(() => {
    if (remember('paused') || document.hidden) return
    remember('place', JSON.stringify({scroll: scrollY, focus: document.activeElement?.id, open: all('details').map(o => o.open)}))
    location.reload()
  }, 1000*seconds)
}

// ---- begin
function setTheme(theme) {
  root.dataset.theme = $('theme').value = theme
  remember('theme', theme)
}

async function begin() {
  setTheme(remember('theme') || 'system')
  $('theme').onchange = e => setTheme(e.target.value)
  await loadPlotly()
  charts = JSON.parse(await unpack('charts'))
  setSmoothing(remember('smoothing') || 0)
  $('smoothing').oninput = e => { setSmoothing(e.target.value); all('[data-charts=curves] .plot').forEach(redraw) }
  for (const o of all('.pick')) o.onclick = () => choose(+o.dataset.layer, true)
  if ($('layer-choice')) $('layer-choice').onchange = e => choose(+e.target.value)
  for (const place of all('[data-charts]')) {   // what is folded has no width: it is drawn when it opens
    const fold = place.closest('details')
    if (fold) fold.addEventListener('toggle', () => fold.open && draw(place))
    if (!fold || fold.open) await draw(place)
  }
  await choose(firstChoice())
  if (document.body.dataset.live) live(+document.body.dataset.live)
  root.dataset.drawn = 'yes'
}

begin().catch(e => { $('problem').hidden = false; $('problem').append(` (${e})`) })
