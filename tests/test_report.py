"The page of a run: what is in it, and how it behaves in a browser."
import re, shutil, sys, threading
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import miniai.report
from miniai.activations import ActivationStats
from miniai.callback import Callback
from miniai.evidence import Evidence, Facts
from miniai.charts import RunData, colors as line_colors, hist_chart, kept_rows, line_chart, numbers
from miniai.compare import compare
from miniai.conv import conv
from miniai.datasets import DataLoaders
from miniai.device import set_seed
from miniai.files import atomic_write
from miniai.history import History
from miniai.inspector import InspectorCB
from miniai.learner import MetricsCB, TrainLearner
from miniai.plots import short_names
from miniai.report import ReportCB, plotly_script, report_html, write_report
from miniai.training import accuracy
from miniai.watch import Watcher
from shared import CountReads, ReadsPerStep

hostile = '<script>alert(1)</script>', '"><img src=x onerror=alert(2)>', '%{y}$x$ & <b>bold</b>'


class Quiet(MetricsCB):
    def _log(self, d): pass


def hostile_learner():
    "A small net whose layers have names that mean something to a browser; its third ReLU is dead."
    set_seed(1)
    batches = [(torch.randn(32, 1, 16, 16), torch.randint(10, (32,))) for _ in range(14)]
    dls, model = DataLoaders(batches[:12], batches[12:]), nn.Sequential()
    for name, o in zip((*hostile, 'flat', 'out'), (conv(1, 4, ks=5), conv(4, 8), conv(8, 8), nn.Flatten(), nn.Linear(32, 10))):
        model.add_module(name, o)
    with torch.no_grad(): model[2][0].bias.fill_(-10)
    return TrainLearner(model, dls, F.cross_entropy, lr=.1, cbs=[Quiet(accuracy=accuracy), ActivationStats()])


@pytest.fixture(scope='module')
def learn():
    res = hostile_learner()
    res.fit(2)
    return res


@pytest.fixture(scope='module')
def page(learn, tmp_path_factory): return write_report(learn, tmp_path_factory.mktemp('report')/'run.html')


def text(path): return path.read_text(encoding='utf-8')


# ---- without a browser

def test_one_file_that_fetches_nothing(page):
    html = text(page)
    assert not re.findall(r'(?:src|href)="(?!#|data:text/csv)', html) and '@import' not in html and 'url(' not in html
    assert "default-src 'none'" in html
    assert page.stat().st_size < 3e6


def test_names_are_no_markup(page):
    html = text(page)
    assert all(o not in html for o in hostile)
    assert '&lt;script&gt;alert(1)&lt;/script&gt;' in html
    assert html.count('<script') == html.count('</script>') == 3


def test_parts_in_order(page):
    assert re.findall(r'<h2>(.*?)</h2>', text(page)) == [
        'loss', 'accuracy', 'run', 'findings',
        'Findings', 'Curves', 'Layers', 'One layer', 'What was run', 'Cost of watching']


def test_each_finding_has_its_source(learn, page):
    found = learn.diagnose()
    assert found and all(o.source for o in found)
    assert text(page).count('Source: ') == len(found)


def test_thirty_layers_and_a_thousand_steps_can_be_mailed(tmp_path):
    "Counts and values without any pattern, which pack worst."
    layers, history = tuple(f'body.{i}.conv' for i in range(30)), History(max_bytes=400_000_000)
    torch.manual_seed(0)
    for step in range(1000):
        where = dict(step=step, epoch=step//100, samples=64)
        history.record('batch', 'loss', torch.rand(()), **where)
        for layer in layers:
            for stat in ('mean', 'std', 'death_rate'): history.record(layer, stat, torch.rand(()), **where)
            history.record(layer, 'hist', torch.randint(0, 5000, (44,)).int(), **where)
            for stat in ('grad_norm', 'update_ratio', 'grad_correlation'):
                history.record(f'{layer}.weight', stat, torch.rand(()), **where)
    path = write_report(Evidence(history, Facts(layers={o: 'Conv2d' for o in layers})), tmp_path/'big.html')
    assert 3e6 < path.stat().st_size < 5e6


def test_thinning_keeps_extremes_and_rows():
    values = np.random.default_rng(0).standard_normal((3, 5000))
    rows = kept_rows(values, 300)
    assert len(rows) <= 302 and rows[0] == 0 and rows[-1] == 4999
    for line in values: assert {line.argmin(), line.argmax()} <= set(rows)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_numbers_are_those_of_the_table(dtype):
    "Single precision exactly, double precision to nine digits."
    values = (10**np.random.default_rng(0).uniform(-30, 30, 2000)).astype(dtype)
    shown = numbers(values).astype(dtype)
    assert (shown == values).all() if dtype == np.float32 else np.allclose(shown, values, rtol=1e-8, atol=0)


def test_a_run_that_blew_up(tmp_path):
    learn = hostile_learner()
    learn.fit(1, lr=1e38)
    assert not np.isfinite(learn.history.series('batch', 'loss').values).all()
    assert write_report(learn, tmp_path/'nan.html').stat().st_size > 1e6


@pytest.mark.parametrize('x', [History(), TrainLearner(nn.Linear(2, 2), cbs=ActivationStats()), [History(), History()]])
def test_nothing_recorded_yet(x): assert 'No layer was watched' in report_html(x) or 'layer-choice' in report_html(x)


def test_two_fits_the_last_is_shown(tmp_path):
    learn = hostile_learner()
    learn.fit(1); learn.fit(2)
    assert ' 24 steps ' in text(write_report(learn, tmp_path/'two.html'))


def test_odd_names(tmp_path):
    model = nn.Sequential()
    for name in ('\ud800', 'Größe\u202e', 'a'*300, '</STYLE>'): model.add_module(name, nn.Linear(2, 2))
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    learn = TrainLearner(model, DataLoaders([(x, y)]*2, [(x, y)]), cbs=ActivationStats())
    learn.fit(1)
    html = text(write_report(learn, tmp_path/'odd.html'))
    assert 'Größe' in html and html.lower().count('</style>') == 1


def test_without_plotly(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'plotly.offline', None)
    plotly_script.cache_clear()
    with pytest.raises(ImportError, match='pip install plotly'): ReportCB(tmp_path/'x.html')


def test_without_jinja2(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'jinja2', None)
    with pytest.raises(ImportError, match='pip install jinja2'): ReportCB(tmp_path/'x.html')


# ---- while it trains

class Pages(ReportCB):
    "Notes, after each pass, whether there is a page and whether it is live."
    fraction = 1e9
    def before_fit(self, learn):
        super().before_fit(learn)
        self.seen = []
    def cleanup_epoch(self, learn):
        super().cleanup_epoch(learn)
        self.seen.append(self.path.exists() and 'data-live' in text(self.path))


def test_live_pages_then_a_finished_one(tmp_path):
    learn, cb = hostile_learner(), Pages(tmp_path/'live.html', every=2)
    learn.fit(4, cbs=cb)
    assert cb.seen == [False]*2 + [True]*6   # one for each pass
    assert 'data-live' not in text(cb.path)
    assert [o.name for o in tmp_path.iterdir()] == ['live.html']


class Fail(Callback):
    def after_loss(self, learn):
        if learn.n_steps == 15: raise KeyboardInterrupt


def test_finished_page_whatever_ends_the_fit(tmp_path):
    learn, cb = hostile_learner(), Pages(tmp_path/'live.html')
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=[cb, Fail()])
    assert cb.seen[:2] == [True, True] and 'data-live' not in text(cb.path)


def test_no_step_reads_from_the_device(tmp_path):
    learn = hostile_learner()
    with CountReads() as counter:
        reads = ReadsPerStep(counter)
        learn.fit(2, cbs=[Pages(tmp_path/'live.html'), reads])
    assert len(reads.per_step) == 28 and not any(reads.per_step) and counter.reads


def test_lr_find_writes_nothing(tmp_path):
    learn = hostile_learner()
    learn.cbs.append(ReportCB(tmp_path/'live.html'))
    learn.lr_find(max_epochs=1, plot=False)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path):
    (tmp_path/'taken').write_text('x')
    learn = hostile_learner()
    with pytest.warns(UserWarning, match='was not written') as told: learn.fit(3, cbs=Pages(tmp_path/'taken'/'live.html'))
    assert learn.n_steps == 36 and sum('was not written' in str(o.message) for o in told) == 1


def test_never_half_a_page(tmp_path):
    path, stop, bad = tmp_path/'x.html', threading.Event(), []
    atomic_write(path, 'a'*500_000)
    def look():
        while not stop.is_set():
            if len(text(path)) != 500_000: bad.append(1)
    reader = threading.Thread(target=look)
    reader.start()
    for letter in 'bcdefghij'*5: atomic_write(path, letter*500_000)
    stop.set(); reader.join()
    assert not bad


def test_live_by_the_method(tmp_path):
    learn = hostile_learner()
    path = learn.report(tmp_path/'run.html', live=True)
    assert 'data-live' in text(path)
    learn.fit(1)
    assert 'data-live' not in text(path) and ' 12 steps ' in text(path)


# ---- in a browser

@pytest.fixture(scope='module')
def browser():
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not chromium: pytest.skip('no chromium: apt-get install chromium')
    with sync_api.sync_playwright() as p:
        res = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield res
        res.close()


class Tab:
    "A page in a tab of its own, with all that went wrong in it."
    def __init__(self, browser, path, width=1280, theme='light', touch=False):
        self.context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=theme, has_touch=touch,
                                           is_mobile=touch)
        self.page, self.wrong, self.requests = self.context.new_page(), [], []
        self.page.on('console', lambda o: self.wrong.append(o.text))
        self.page.on('pageerror', lambda o: self.wrong.append(str(o)))
        self.page.on('dialog', lambda o: (self.wrong.append(o.message), o.dismiss()))
        self.page.on('request', lambda o: self.requests.append(o.url))
        self.page.goto(path.as_uri())
        self.drawn()
    def drawn(self): self.page.wait_for_selector('html[data-drawn=yes]', timeout=60_000)
    def __enter__(self): return self
    def __exit__(self, *args): self.context.close()
    def figure(self, title): return self.page.locator('#layer-charts figure', has=self.page.locator(f'h3:text-is("{title}")'))
    def js(self, code): return self.page.evaluate(code)


@pytest.fixture(scope='module')
def tab(browser, page):
    with Tab(browser, page) as res: yield res


def test_nothing_goes_wrong_and_nothing_is_fetched(tab, page):
    assert tab.wrong == [] and tab.requests == [page.as_uri()]
    assert tab.page.locator('.plot .main-svg').count() >= 8 and not tab.page.locator('#problem').is_visible()


def choose(tab, layer): tab.page.select_option('#layer-choice', label=layer)


def point_at(tab, title, x=.5, y=.5):
    "Hold the pointer over a chart; what it says."
    area = tab.figure(title).locator('.nsewdrag').first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    tab.page.mouse.move(0, 0)
    tab.page.mouse.move(box['x'] + box['width']*x, box['y'] + box['height']*y)
    tab.page.wait_for_function('e => e.textContent', arg=tab.figure(title).locator('output').element_handle())
    return tab.figure(title).locator('output').inner_text(), tab.figure(title).locator('.hoverlayer').text_content()


@pytest.mark.parametrize('x', [.1, .5, .93])
def test_lines_say_the_values_of_the_table(tab, learn, x):
    layer = hostile[0] + '.1'
    choose(tab, layer)
    told, shown = point_at(tab, 'Mean and standard deviation', x)
    step, mean, std = re.fullmatch(r'step (\d+): mean (\S+), std (\S+)', told).groups()
    for stat, value in (('mean', mean), ('std', std)):
        recorded = learn.cbs[1].history.series(layer, stat)
        assert np.float32(value) == recorded.values[recorded.steps == int(step)].item()
        assert value in shown


@pytest.mark.parametrize('x,y', [(.2, .99), (.8, .95), (.5, .3)])
def test_maps_say_the_counts_of_the_table(tab, learn, x, y):
    layer = hostile[1] + '.0'
    choose(tab, layer)
    told, shown = point_at(tab, f'Histogram: {layer}'.replace('"', '\\"'), x, y)
    step, low, high, count = re.fullmatch(r'step (\d+), \|output\| (\S+) to (\S+): (\d+)', told).groups()
    recorded = learn.cbs[1].history.series(layer, 'hist')
    assert int(count) == recorded.values[recorded.steps == int(step)][0, round(float(low)*4)]
    assert float(high) == float(low) + .25 and count in shown and f'{low} to {high}' in shown


def test_names_are_text(tab):
    page = tab.page
    assert page.locator('#layer-choice option').all_inner_texts()[:2] == [hostile[0] + '.0', hostile[0] + '.1']
    assert page.locator('tr[data-layer] .pick').all_inner_texts()[0] == hostile[0] + '.0'
    assert page.locator('img, b:text-is("bold")').count() == 0
    ticks = page.locator('[data-charts=overview] .ytick text').all_text_contents()
    assert {*short_names([o + ".1" for o in hostile])} <= set(ticks)
    assert tab.wrong == []


def test_a_finding_leads_to_its_layer(tab):
    choose(tab, 'out')
    finding = tab.page.locator('.finding', has=tab.page.locator('.pick', has_text=hostile[2] + '.1')).first
    finding.locator('summary').click()
    finding.locator('.pick').click()
    assert tab.js("document.querySelector('#layer-choice').selectedOptions[0].text") == hostile[2] + '.1'
    assert tab.js('document.activeElement.id') == 'layer-choice'


def heard(tab, title, start):
    "What a chart says once it begins with `start`, without that."
    output = tab.figure(title).locator('output')
    tab.page.wait_for_function('([e, start]) => e.textContent.startsWith(start)', arg=[output.element_handle(), start])
    return output.inner_text()[len(start):]


def test_by_keyboard_alone(browser, page, learn):
    with Tab(browser, page) as tab:
        for _ in range(100):
            tab.page.keyboard.press('Tab')
            if tab.js('document.activeElement.id') == 'layer-choice': break
        assert tab.js('document.activeElement.id') == 'layer-choice'
        for key in ('Home', 'ArrowDown'): tab.page.keyboard.press(key)
        tab.page.wait_for_selector(f'h3:text-is("Histogram: {hostile[0]}.1")')
        while 'Mean and' not in (tab.js("document.activeElement.getAttribute('aria-label')") or ''): tab.page.keyboard.press('Tab')
        recorded = learn.cbs[1].history.series(hostile[0] + '.1', 'mean')
        for key, step in dict(ArrowRight=0, End=23, ArrowLeft=22, Home=0, PageDown=2).items():
            tab.page.keyboard.press(key)
            mean = re.match('mean (.*?),', heard(tab, 'Mean and standard deviation', f'step {step}: '))[1]
            assert np.float32(mean) == np.float32(recorded.values[step])
        assert tab.wrong == []


def test_curves_are_smoothed_and_hidden(browser, page):
    "By keyboard; the values stay behind, faint, and are not read out. A reload keeps the smoothing."
    from miniai.plots import smoothed
    data = lambda o: tab.js(f"(() => {{ const b = [...document.querySelectorAll('[data-charts=curves] .plot')][0]; return {o} }})()")
    with Tab(browser, page) as tab:
        raw, n = data('b.data[0].y'), data('b.data.length')
        tab.page.focus('#smoothing')
        tab.page.keyboard.press('End')
        tab.page.wait_for_function("document.querySelector('[data-charts=curves] .plot').data[1].opacity === 1")
        assert tab.js("document.getElementById('smoothed').textContent") == '0.99' and data('b.data.length') > n
        assert data('b.data[0].opacity') == .25 and data('b.data[0].y') == raw
        assert np.allclose(data('b.data[1].y'), smoothed(raw, .99))
        key = tab.page.locator('[data-charts=curves] .key').first
        key.focus()
        tab.page.keyboard.press('Enter')
        tab.page.wait_for_function("document.querySelector('[data-charts=curves] .plot').data[1].visible === false")
        assert key.get_attribute('aria-pressed') == 'false'
        tab.page.reload(); tab.drawn()
        assert data('b.data[0].opacity') == .25 and tab.wrong == []

def test_maps_by_keyboard(tab, learn):
    choose(tab, 'out')
    plot = tab.figure('Histogram: out').locator('.plot')
    plot.focus()
    for key in ('End', 'ArrowUp', 'ArrowUp'): tab.page.keyboard.press(key)
    count = learn.cbs[1].history.series('out', 'hist').values[-1, 2]
    assert heard(tab, 'Histogram: out', 'step 23, |output| 0.5 to 0.75: ') == str(count)


def test_themes(browser, page):
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    def is_dark():
        tab.page.wait_for_timeout(300)
        found = tab.js(ground) == 'rgb(20, 23, 27)', tab.js(ink) == 'rgb(232, 235, 238)'
        assert found[0] == found[1]
        return found[0]
    with Tab(browser, page, theme='dark') as tab:
        assert is_dark()
        tab.page.emulate_media(color_scheme='light')
        assert not is_dark()
        tab.page.select_option('#theme', 'dark')
        assert is_dark()
        tab.page.reload(); tab.drawn()   # it is remembered
        assert is_dark()
        tab.page.select_option('#theme', 'system')
        assert not is_dark() and tab.wrong == []


def luminance(color):
    parts = [int(color[i:i+2], 16)/255 for i in (1, 3, 5)]
    linear = [o/12.92 if o <= .04045 else ((o+.055)/1.055)**2.4 for o in parts]
    return sum(w*o for w, o in zip((.2126, .7152, .0722), linear))


@pytest.mark.parametrize('theme', [0, 1])
def test_contrast(theme):
    "WCAG 2: 4.5 to 1 for text, 3 to 1 for lines."
    css = (Path(miniai.report.__file__).parent/'templates'/'page.css').read_text(encoding='utf-8')
    both = re.findall(r'--(\w+): light-dark\((#\w{6}), (#\w{6})\)', css)
    colors = {name: pair[theme] for name, *pair in both} | {f'c{i}': o for i, o in enumerate(line_colors)}
    def contrast(one, two):
        low, high = sorted(luminance(colors[o]) for o in (one, two))
        return (high+.05)/(low+.05)
    for ground in ('bg', 'card', 'mark'):
        for ink in ('fg', 'link') if ground == 'mark' else ('fg', 'muted', 'link', 'error', 'warning', 'note'):
            assert contrast(ink, ground) >= 4.5, (ink, ground)
    for i in range(6): assert contrast(f'c{i}', 'card') >= 3, i


@pytest.mark.parametrize('width', [390, 320])
def test_on_a_phone(browser, page, width):
    with Tab(browser, page, width=width, touch=True) as tab:
        assert tab.js('document.documentElement.scrollWidth') == width
        wide = tab.js("""[...document.querySelectorAll('main *')].filter(o => !o.closest('.scroll, svg, .plot')
                         && o.getBoundingClientRect().right > innerWidth + 1).map(o => o.outerHTML.slice(0, 80))""")
        cut = tab.js("""[...document.querySelectorAll('.plot')].filter(o => o.querySelector('.main-svg') &&
                        o.querySelector('.main-svg').getBoundingClientRect().width > o.clientWidth + 1).length""")
        assert wide == [] and cut == 0 and tab.wrong == []


def test_live_page_keeps_its_place(browser, learn, tmp_path):
    path = tmp_path/'live.html'
    atomic_write(path, report_html(learn, live=3, title='One'))
    with Tab(browser, path) as tab:
        choose(tab, 'out')
        tab.page.wait_for_selector('h3:text-is("Histogram: out")')
        tab.page.focus('#layer-choice')
        tab.js('scrollTo(0, 700)')
        atomic_write(path, report_html(learn, live=3, title='Two'))
        tab.page.wait_for_selector('h1:text-is("Two")', timeout=30_000)
        tab.drawn()
        assert tab.js("document.querySelector('#layer-choice').selectedOptions[0].text") == 'out'
        assert tab.js('scrollY') == 700 and tab.js('document.activeElement.id') == 'layer-choice'
        write_report(learn, path, title='Finished')
        tab.page.wait_for_selector('h1:text-is("Finished")', timeout=30_000)
        tab.drawn()
        n = len(tab.requests)
        tab.page.wait_for_timeout(1500)
        assert len(tab.requests) == n and tab.wrong == []


def test_live_page_can_be_paused(browser, learn, tmp_path):
    path = tmp_path/'live.html'
    atomic_write(path, report_html(learn, live=.5))
    with Tab(browser, path) as tab:
        tab.page.click('#pause')
        tab.drawn()
        n = len(tab.requests)
        tab.page.wait_for_timeout(1500)
        assert len(tab.requests) == n and tab.page.inner_text('#pause') == 'Go on'


def test_without_scripts_words_and_tables_are_there(browser, page):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator('.finding').first.is_visible() and tab.locator('svg.spark').first.is_visible()
    assert 'need a browser' in tab.inner_text('noscript')
    context.close()


def test_before_the_first_fit_everybody_may_watch(tmp_path):
    learn = hostile_learner()
    assert isinstance(learn.watch(every=1, ranks=True, ranges=True), Watcher)
    assert 'Cost of watching' in text(learn.report(tmp_path/'run.html'))


class Crossed(nn.Module):
    "Has its layers registered in the opposite order of that in which they are called."
    def __init__(self):
        super().__init__()
        self.head, self.act, self.body = nn.Linear(4, 2), nn.ReLU(), nn.Linear(3, 4)
    def forward(self, x): return self.head(self.act(self.body(x)))


@pytest.mark.parametrize('cb', [ActivationStats, lambda: InspectorCB(visualizer=None)])
def test_layers_are_in_the_order_of_the_first_forward(cb):
    batches = [(torch.randn(8, 3), torch.randint(2, (8,)))]*3
    learn = TrainLearner(Crossed(), DataLoaders(batches, batches), F.cross_entropy, lr=.1, cbs=[cb()])
    learn.fit(1)
    html = report_html(learn)
    assert re.findall(r'<option value="\d">(.*?)</option>', html) == ['body', 'act', 'head']


def test_the_folded_line_of_a_finding_says_what_was_found(learn, page):
    lines = [unescape(o) for o in re.findall(r'<summary>(.*?)</summary>', text(page), re.S)]
    for o in learn.diagnose(): assert any(o.text.replace('`', '') in re.sub('</?code>', '', line) for line in lines)


def test_short_batches_are_as_bright_as_others():
    rows = History()
    for step, n in enumerate((64, 64, 8)): rows.record('a', 'hist', torch.full((44,), n).int(), step=step, epoch=0)
    chart, = hist_chart(RunData(Evidence(rows, Facts(layers={'a': 'ReLU'}))), 'a', 'hist', 500)
    assert chart['scale'].tolist() == [1, 1, 8] and chart['figure'].data[0].zmax == 64


def test_zeros_of_a_logarithmic_chart_are_marked():
    chart = line_chart('', 'step', {'a': (np.arange(3), np.array([1., 0., .1]))}, log=True)
    assert chart['figure'].data[1].x == (1,) and chart['caption'] == 'Triangles: zero, or less.'


def test_differences_of_numbers_come_first():
    runs = {}
    for nm, losses, more in (('one', [1., .9], {}), ('two', [1., .1], dict(b=2.))):
        h = runs[nm] = History()
        for step, loss in enumerate(losses):
            for source, value in (dict(batch=loss, a=1.) | more).items(): h.record(source, 'loss', value, step=step, epoch=0)
    assert list(compare(runs).table.layer) == ['batch', 'b', 'a']
    html = report_html(runs)
    assert html.index('<td class="name">batch') < html.index('<td class="name">b<') < html.index('<td class="name">a<')
