"Drawing primitives."
import subprocess
import sys

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from miniai.plots import (caption, get_grid, heatmap, log_scale, plot_lines, short_names, show_image,
                          show_images, subplots)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def test_import_without_matplotlib():
    code = "import sys, miniai.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('n', [*range(1, 14), 17, 23, 31])
def test_grid_has_a_cell_for_each(n):
    fig, axs = get_grid(n, imsize=.5)
    assert isinstance(axs, np.ndarray)
    assert [ax.get_visible() for ax in axs.flat] == [True]*n + [False]*(axs.size-n)


@pytest.mark.parametrize('n,kw,shape', [
    (5, dict(nrows=1), (5,)), (5, dict(ncols=2), (3, 2)), (5, dict(nrows=2), (2, 3)),
    (5, dict(nrows=2, ncols=4), (2, 4)), (1, {}, (1,))])
def test_grid_shapes(n, kw, shape): assert get_grid(n, imsize=.5, **kw)[1].shape == shape


@pytest.mark.parametrize('args,words', [
    ((7, 2, 3), 'n is 7, nrows 2 and ncols 3'), ((0,), 'n is 0'), ((3, 0), 'nrows 0 and'), ((3, None, 0), 'ncols 0')])
def test_grid_refuses(args, words):
    with pytest.raises(ValueError, match=words): get_grid(*args)


def test_grid_title():
    fig, axs = get_grid(2, title='Layers', size=9, weight='normal')
    title = fig._suptitle
    assert (title.get_text(), title.get_size(), title.get_weight()) == ('Layers', 9, 'normal')


@pytest.mark.parametrize('shape,wanted', [
    ((8, 9), (8, 9)), ((1, 8, 9), (8, 9)), ((3, 8, 9), (8, 9, 3)), ((4, 8, 9), (8, 9, 4)),
    ((8, 9, 3), (8, 9, 3)),
    ((8, 9, 1), (8, 9)), ((1, 8, 3), (8, 3)), ((3, 9, 3), (3, 9, 3))])
@pytest.mark.parametrize('make', [torch.rand, lambda *o: torch.rand(*o).bfloat16(),
                                  lambda *o: np.random.rand(*o)], ids=['float', 'bfloat16', 'numpy'])
def test_image_shapes(shape, wanted, make):
    assert show_image(make(*shape)).images[0].get_array().shape == wanted


def test_image_draws_on_the_axes_given():
    fig, axs = subplots(1, 2)
    assert show_image(torch.rand(4, 4), ax=axs[1], title='right') is axs[1]
    assert not axs[0].images and axs[1].get_title() == 'right'


def test_image_keeps_the_users_colours():
    assert show_image(torch.rand(4, 4), cmap='magma').images[0].get_cmap().name == 'magma'
    with plt.rc_context({'image.cmap': 'plasma'}):
        assert show_image(torch.rand(4, 4)).images[0].get_cmap().name == 'plasma'


@pytest.mark.parametrize('shape', [(3,), (2, 8, 9), (2, 3, 8, 9)])
def test_image_refuses(shape):
    with pytest.raises(ValueError, match='show_image: got shape'): show_image(torch.rand(*shape))


def test_images_take_a_batch():
    show_images(torch.rand(5, 1, 6, 6), titles=list('abcde'))
    axs = [ax for ax in plt.gcf().axes if ax.get_visible()]
    assert [ax.get_title() for ax in axs] == list('abcde') and all(ax.images for ax in axs)


def test_line_gaps_and_lonely_values():
    y = np.array([1, 2, np.nan, 3, np.nan, 4, 5])
    ax = plot_lines(subplots()[1], None, {'y': y})
    assert np.isnan(ax.lines[0].get_ydata()).sum() == 2
    assert ax.lines[1].get_ydata().tolist() == [3]
    assert ax.lines[1].get_color() == ax.lines[0].get_color()


def test_heatmap_row_zero_is_at_the_bottom():
    fig, ax = subplots()
    heatmap(ax, np.array([[0., 0.], [9., 9.]]))
    fig.canvas.draw()
    low, high = ax.transData.transform([(0, 0), (0, 1)])
    assert low[1] < high[1]
    assert ax.images[0].get_cursor_data(FakeEvent(ax, (0, 1))) == 9


class FakeEvent:
    "What matplotlib asks of a mouse event."
    def __init__(self, ax, at): self.x, self.y = ax.transData.transform(at)


def test_heatmap_gap_is_not_a_low_value():
    fig, ax = subplots()
    heatmap(ax, np.array([[0., np.nan, 1.]]))
    assert ax.images[0].get_array().mask.tolist() == [[False, True, False]]


@pytest.mark.parametrize('values', [np.ones((3, 0)), np.ones((0, 3)), np.full((2, 2), np.nan)])
def test_empty_heatmap_says_so(values):
    assert heatmap(subplots()[1], values).texts[0].get_text() == 'nothing recorded yet'


@pytest.mark.parametrize('x', [[0, 10, 20], [0, 1, 10]])
def test_heatmap_positions(x):
    fig, ax = subplots()
    heatmap(ax, np.ones((2, 3)), x=x)
    low, high = ax.get_xlim()
    assert low < 0 and high > x[-1]


@pytest.mark.parametrize('layout', ['constrained', None])
def test_caption_is_not_cut_off(layout):
    fig, axs = get_grid(4, imsize=1.5, layout=layout)
    text = caption(fig, 'many words '*30)
    fig.canvas.draw()
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1
    lowest = min(ax.get_tightbbox().y0 for ax in axs.flat)
    assert box.y1 <= lowest
    caption(fig, 'short')
    assert text.get_text() == 'short'


def test_zeros_on_a_logarithmic_axis_are_marked():
    "They have no place on it, and were a gap without a word."
    from miniai.evidence import Chart
    ax = Chart({'norm': (np.arange(4), np.array([1., 0., .1, 0.]))}, log=True).draw()
    assert ax.get_yscale() == 'log' and ax.lines[-1].get_xdata().tolist() == [1, 3]
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['norm', 'zero, or less']
    assert Chart({'norm': (np.arange(2), np.zeros(2))}, log=True).draw().get_yscale() == 'linear'


def test_a_line_across_is_neither_data_nor_marked():
    fig, ax = plt.subplots()
    ax.plot([5., 9.], [0., 0.])
    ax.axhline(.1)
    log_scale(ax)
    assert ax.get_yscale() == 'linear'
    ax.plot([5., 9.], [1., 2.])
    ax.axhline(0.)
    log_scale(ax)
    assert [o.get_xdata().tolist() for o in ax.lines if o.get_label() == 'zero, or less'] == [[5., 9.]]


def test_names_that_differ_are_not_shortened_to_one():
    names = [f'model.backbone.layer{i}.0.downsample.{j}' for i in (1, 2) for j in (0, 1)] + ['backbone.conv1', 'bottleneck.conv1']
    cut = short_names([*names, 'bottleneck.projection.layers.0.conv1'])
    assert len({*cut}) == 7 and cut[0] == 'm.b.layer1.0.downsample.0'
