"Fashion-MNIST sources, collation, loaders by item and from memory."
import gzip
import io
import json
import shutil
import socket
import time

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, Value, config
from PIL import Image as PILImage

from miniai import datasets as mod
from miniai.datasets import (DataLoaders, MemoryLoader, arrays_to_dataset, collate_dict, fashion_features,
                             fashion_mnist, fashion_names, idx_folder, image_to_tensor, inplace, missing_idx, read_idx)
from small_data import first_of_each, make_small, write_idx

realdata = pytest.mark.skipif(bool(missing_idx(idx_folder)),
                              reason='dataset-fashion-mnist is not installed')
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device on this machine')


def tiny(n=37, n_test=11, seed=0):
    "A small `DatasetDict` with the features of Fashion-MNIST."
    rng = np.random.default_rng(seed)
    def split(n):
        return arrays_to_dataset(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), rng.integers(0, 10, n))
    return DatasetDict(train=split(n), test=split(n_test))


@pytest.fixture(scope='module')
def blank_idx(tmp_path_factory):
    "A folder of four valid IDX files of black images."
    folder = tmp_path_factory.mktemp('idx')
    for part, n in (('train', 60_000), ('t10k', 10_000)):
        write_idx(folder/f'{part}-images-idx3-ubyte', np.zeros((n, 28, 28), np.uint8))
        write_idx(folder/f'{part}-labels-idx1-ubyte.gz', np.arange(n) % 10)
    return folder


@pytest.fixture
def idx_copy(blank_idx, tmp_path):
    "A folder of links to those files, to be spoilt."
    for o in blank_idx.iterdir(): (tmp_path/o.name).symlink_to(o)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    "Any attempt to reach the network fails the test."
    def refuse(*args, **kw): pytest.fail('the network was asked')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


# Sources

def test_names_are_the_hubs():
    assert fashion_names == ['T - shirt / top', 'Trouser', 'Pullover', 'Dress', 'Coat',
                             'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']


def test_small_is_even_and_offline(offline):
    dd = fashion_mnist('small')
    assert list(dd) == ['train', 'test'] and dd['train'].column_names == ['image', 'label']
    for nm, n in (('train', 600), ('test', 100)):
        assert dd[nm].features == Features(image=Image(), label=ClassLabel(names=fashion_names))
        assert np.bincount(dd[nm]['label']).tolist() == [n]*10
    image = dd['train'][0]['image']
    assert (image.mode, image.size) == ('L', (28, 28))


def test_small_is_small_and_has_its_licence():
    files = list(mod.small_folder.glob('*.parquet'))
    assert len(files) == 2 and sum(o.stat().st_size for o in files) <= 4_000_000
    licence = next(mod.small_folder.glob('LICENSE*')).read_text()
    assert 'Zalando SE' in licence and 'Permission is hereby granted' in licence


@realdata
def test_small_pixels_are_the_real_ones(tmp_path):
    small, full = fashion_mnist('small'), fashion_mnist('idx')
    for nm, n in (('train', 600), ('test', 100)):
        keep = first_of_each(full[nm]['label'], n)
        assert list(full[nm].select(keep)['label']) == list(small[nm]['label'])
        for real, ours in zip(full[nm].select(keep)['image'], small[nm]['image']):
            assert np.array_equal(np.asarray(real), np.asarray(ours))


@realdata
def test_small_can_be_made_again(tmp_path):
    make_small(tmp_path)
    for o in tmp_path.iterdir():
        ours, new = Dataset.from_parquet(str(mod.small_folder/o.name)), Dataset.from_parquet(str(o))
        assert ours.features == new.features == fashion_features()
        for one, two in zip(ours['image'], new['image'], strict=True): assert np.array_equal(one, two)
        assert ours['label'] == new['label']


@realdata
def test_real_idx(offline):
    dd = fashion_mnist('idx')
    assert {nm: len(ds) for nm, ds in dd.items()} == dict(train=60_000, test=10_000)
    assert np.bincount(dd['train']['label']).tolist() == [6000]*10
    assert dd['train'][0]['label'] == 9 and np.asarray(dd['train'][0]['image']).sum() == 76247
    pixels = read_idx(idx_folder/'t10k-images-idx3-ubyte.gz', 'images', 10_000)
    assert all(np.array_equal(pixels[i], np.asarray(dd['test'][i]['image'])) for i in (0, 5000, 9999))


def test_idx_plain_and_gz(blank_idx, offline):
    dd = fashion_mnist('idx', path=blank_idx)
    assert (len(dd['train']), len(dd['test'])) == (60_000, 10_000)
    assert dd['train'].features == fashion_features()
    assert str(blank_idx) in dd['train'].info.description


def cut(path): raw = path.read_bytes(); path.unlink(); path.write_bytes(raw[:999_999])
def cut_gz(path): raw = path.read_bytes(); path.unlink(); path.write_bytes(raw[:-20])
def page(path): path.unlink(); path.write_bytes(b'<html>Not found</html>')
def empty(path): path.unlink(); path.write_bytes(b'')
def longer(path): raw = path.read_bytes(); path.unlink(); path.write_bytes(raw + b'\0')
def labels_there(path): path.unlink(); write_idx(path, np.zeros(60_000))
def ten_thousand(path): path.unlink(); write_idx(path, np.zeros((10_000, 28, 28)))
def other_size(path): path.unlink(); write_idx(path, np.zeros((60_000, 2, 2)))
def many_classes(path): path.unlink(); write_idx(path, np.arange(60_000) % 47)
def double_gz(path): raw = path.read_bytes(); path.unlink(); path.write_bytes(gzip.compress(raw))


images, labels = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte.gz'


@pytest.mark.parametrize('name,spoil,words', [
    (images, cut, ['999,999 bytes', '47,040,016', 'cut off']),
    (images, longer, ['47,040,017 bytes', '47,040,016', 'too long']),
    (images, page, ['22 bytes', "b'<htm'", 'expected an IDX file']),
    (images, empty, ['0 bytes', 'expected an IDX file']),
    (images, labels_there, ['holds 60,000 labels', 'expected 60,000 images', 'swapped']),
    (images, ten_thousand, ['holds 10,000 images', 'expected 60,000', 'swapped']),
    (images, other_size, ['(2, 2)', 'expected (28,28)']),
    (labels, cut_gz, ['no complete gzip file', 'expected a gzipped IDX file']),
    (labels, page, ['22 bytes', 'no complete gzip file']),
    (labels, double_gz, ['expected an IDX file']),
    (labels, many_classes, ['label 46', 'expected 0 to 9'])])
def test_bad_idx_file_names_itself(idx_copy, name, spoil, words):
    spoil(idx_copy/name)
    with pytest.raises(ValueError) as e: fashion_mnist('idx', path=idx_copy)
    for o in [str(idx_copy/name), *words]: assert o in str(e.value)


def test_images_and_labels_swapped(idx_copy):
    (idx_copy/images).unlink()
    raw = gzip.decompress((idx_copy/labels).read_bytes())
    (idx_copy/images).write_bytes(raw)
    with pytest.raises(ValueError, match='holds 60,000 labels.*expected 60,000 images'): fashion_mnist('idx', path=idx_copy)


@pytest.mark.parametrize('source', ['idx', 'auto'])
def test_missing_file_is_no_fallback(idx_copy, source):
    (idx_copy/labels).unlink()
    with pytest.raises(FileNotFoundError, match='lacks train-labels-idx1-ubyte'):
        fashion_mnist(source, path=idx_copy)


def test_unknown_source():
    with pytest.raises(ValueError, match="'Idx'.*auto, hub, idx, small"): fashion_mnist('Idx')


def test_small_takes_no_path(tmp_path):
    with pytest.raises(ValueError, match='leave it out'): fashion_mnist('small', path=tmp_path)


def fake_cache(root, dd):
    "Lay `dd` out as `load_dataset` leaves it in its cache."
    folder = root/'zalando-datasets___fashion_mnist/fashion_mnist/0.0.0/abc'
    folder.mkdir(parents=True)
    for nm, ds in dd.items():
        ds.save_to_disk(folder/nm)
        shutil.move(next((folder/nm).glob('*.arrow')), folder/f'fashion_mnist-{nm}.arrow')
        shutil.rmtree(folder/nm)
    (folder/'dataset_info.json').write_text(json.dumps({}))
    return folder


def test_auto_takes_the_best_and_says_which(blank_idx, tmp_path, monkeypatch, offline, capsys):
    monkeypatch.setattr(config, 'HF_DATASETS_CACHE', tmp_path/'cache')
    monkeypatch.setattr(mod, 'idx_folder', tmp_path/'nothing')
    assert len(fashion_mnist()['train']) == 6000
    assert 'images shipped with miniai: 6,000 training and 1,000 test' in capsys.readouterr().out

    dd = tiny()
    folder = fake_cache(tmp_path/'cache', dd)
    ours = fashion_mnist()
    assert 'from the cache of datasets: 37 training and 11 test' in capsys.readouterr().out
    assert ours['train'].features == fashion_features() and ours['test']['label'] == dd['test']['label']

    folder.rename(folder.with_suffix('.incomplete'))
    assert len(fashion_mnist()['train']) == 6000

    monkeypatch.setattr(mod, 'idx_folder', blank_idx)
    capsys.readouterr()
    assert len(fashion_mnist()['train']) == 60_000
    assert f'IDX files in {blank_idx}: 60,000 training' in capsys.readouterr().out


def test_spoilt_idx_stops_auto(idx_copy, monkeypatch):
    page(idx_copy/images)
    monkeypatch.setattr(mod, 'idx_folder', idx_copy)
    with pytest.raises(ValueError, match='expected an IDX file'): fashion_mnist()


def test_hub_that_cannot_be_reached_is_no_fallback(monkeypatch):
    import datasets
    def fails(*args, **kw): raise OSError('no route')
    monkeypatch.setattr(datasets, 'load_dataset', fails)
    words = "'hub' could not load 'zalando-datasets/fashion_mnist'.*OSError: no route"
    with pytest.raises(ConnectionError, match=words): fashion_mnist('hub')


def test_hub_says_where_it_is_from(monkeypatch, tmp_path):
    import datasets
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *args, **kw: asked.append((args, kw)) or tiny())
    assert 'from the Hugging Face Hub' in fashion_mnist('hub', path=tmp_path)['train'].info.description
    assert asked == [(('zalando-datasets/fashion_mnist',), dict(cache_dir=str(tmp_path)))]


# Images as tensors

rng = np.random.default_rng(1)
grey, colour = rng.integers(0, 256, (5, 7), dtype=np.uint8), rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'CMYK', 'P', '1'])
def test_image_to_tensor_8_bit(mode):
    im = PILImage.fromarray(colour).convert(mode)
    pixels = np.array(im).astype(np.uint8)*(255 if mode == '1' else 1)
    want = torch.tensor(np.atleast_3d(pixels).transpose(2, 0, 1)).float()/255
    res = image_to_tensor(im)
    assert res.dtype == torch.float32 and torch.equal(res, want) and res.is_contiguous()


@pytest.mark.parametrize('mode,dtype', [('I', torch.int32), ('F', torch.float32), ('I;16', torch.int16)])
def test_image_to_tensor_keeps_wide_values(mode, dtype):
    pixels = (grey.astype(np.int32)*100) if mode != 'F' else grey.astype(np.float32)/3
    im = PILImage.fromarray(pixels.astype(np.uint16) if mode == 'I;16' else pixels)
    assert im.mode == mode
    res = image_to_tensor(im)
    assert res.dtype == dtype and np.array_equal(res[0].numpy(), pixels.astype(res.numpy().dtype))


def test_image_to_tensor_owns_its_memory():
    im = PILImage.fromarray(grey)
    image_to_tensor(im).zero_()
    assert np.array_equal(np.asarray(im), grey)


# Loaders by item, as the course types them

def test_course_code():
    def transformi(b): b['image'] = [torch.flatten(image_to_tensor(o)) for o in b['image']]
    dd = tiny().with_transform(inplace(transformi))
    dls = DataLoaders.from_dd(dd, 8, num_workers=0)
    xb, yb = next(iter(dls.train))
    assert xb.shape == (8, 784) and yb.dtype == torch.int64
    assert [len(yb) for _, yb in dls.valid] == [11]


def test_from_dd_shuffles_training_only():
    dd = tiny(200, 50)
    dls = DataLoaders.from_dd(dd, 16)
    def all_labels(dl): return torch.cat([yb for _, yb in dl]).tolist()
    torch.manual_seed(0)
    first, second = all_labels(dls.train), all_labels(dls.train)
    assert first != second and sorted(first) == sorted(dd['train']['label'])
    assert all_labels(dls.valid) == list(dd['test']['label'])


def test_from_dd_dict_batches():
    xb = next(iter(DataLoaders.from_dd(tiny(), 4, as_tuple=False).train))
    assert list(xb) == ['image', 'label'] and xb['image'].shape == (4, 1, 28, 28)


def test_from_dd_workers():
    dls = DataLoaders.from_dd(tiny(), 16, num_workers=1)
    assert [len(yb) for _, yb in dls.train] == [16, 16, 5]


def test_collate_one_column_is_a_tuple():
    ds = tiny()['train'].select_columns('image')
    res = collate_dict(ds)([ds[0], ds[1]])
    assert isinstance(res, tuple) and len(res) == 1 and res[0].shape == (2, 1, 28, 28)


def test_collate_names_the_column():
    ds = tiny()['train']
    with pytest.raises(KeyError, match="'label' is missing"): collate_dict(ds)([dict(image=1)])
    with pytest.raises(ValueError, match="'label' makes no batch, its samples are NoneType, int"):
        collate_dict(ds)([dict(image=1, label=1), dict(image=1, label=None)])


@pytest.mark.parametrize('make', [DataLoaders.from_dd, DataLoaders.in_memory])
@pytest.mark.parametrize('change,error,words', [
    (lambda dd: DatasetDict(train=dd['train']), ValueError, r"splits are \['train'\]"),
    (lambda dd: DatasetDict(dd, test=dd['test'].select([])), ValueError, "'test' is empty"),
    (lambda dd: DatasetDict(dd, train=dd['train'].select([])), ValueError, "'train' is empty"),
    (lambda dd: DatasetDict(dd, test=dd['test'].remove_columns('label')), ValueError, 'columns differ')])
def test_bad_splits(make, change, error, words):
    with pytest.raises(error, match=words): make(change(tiny()), 4)


@pytest.mark.parametrize('make', [DataLoaders.from_dd, DataLoaders.in_memory])
def test_split_names(make):
    a, b = tiny().values()
    for dd in (dict(train=a, validation=b), dict(test=b, train=a), dict(train=a, validation=b, test=a),
               dict(train=a, holdout=b), dict(first=a, second=b)):
        dls = make(DatasetDict(dd), 8)
        assert len(dls.train.dataset) == 37 and len(dls.valid.dataset) == 11


@pytest.mark.parametrize('make', [DataLoaders.from_dd, DataLoaders.in_memory])
def test_bad_batch_size(make):
    with pytest.raises(ValueError, match='batch_size is 0'): make(tiny(), 0)


def test_dataloaders_takes_two():
    with pytest.raises(ValueError, match='takes two loaders'): DataLoaders([1])
    assert DataLoaders(1, 2, 3).valid == 2


# Loaders from memory

def same_batches(a, b):
    assert len(a) == len(b)
    for one, two in zip(a, b, strict=True):
        assert type(one) is type(two) and len(one) == len(two)
        for x, y in zip(*((o.values() if isinstance(o, dict) else o) for o in (one, two))):
            assert x.dtype == y.dtype and torch.equal(x, y.cpu())


@pytest.mark.parametrize('as_tuple', [True, False])
@pytest.mark.parametrize('bs', [1, 8, 37, 100])
def test_memory_gives_the_batches_of_from_dd(bs, as_tuple):
    dd = tiny()
    loaders = DataLoaders.from_dd(dd, bs, as_tuple), DataLoaders.in_memory(dd, bs, as_tuple=as_tuple)
    runs = []
    for dls in loaders:
        torch.manual_seed(5)   # two epochs of training and validation, and what is random after them
        runs.append(([list(dl) for dl in (dls.train, dls.valid, dls.train)], torch.rand(3)))
    for one, two in zip(runs[0][0], runs[1][0]): same_batches(one, two)
    assert torch.equal(runs[0][1], runs[1][1])


@realdata
def test_memory_gives_the_real_batches():
    dd = DatasetDict({nm: ds.select(range(3000)) for nm, ds in fashion_mnist('idx').items()})
    loaders = DataLoaders.from_dd(dd, 256), DataLoaders.in_memory(dd, 256)
    runs = []
    for dls in loaders:
        torch.manual_seed(5)
        runs.append(list(dls.train))
    same_batches(*runs)


def test_memory_loader_attributes():
    dd = tiny()
    dls = DataLoaders.in_memory(dd, 8)
    assert (dls.train.batch_size, dls.valid.batch_size) == (8, 16)
    assert dls.train.dataset is dd['train'] and dls.valid.dataset is dd['test']
    assert (len(dls.train), len(dls.valid)) == (5, 1)
    assert dls.train.columns['image'].dtype == torch.uint8


@pytest.mark.parametrize('n,bs,lengths', [(37, 8, [8]*4), (32, 8, [8]*4), (5, 8, [])])
def test_memory_drop_last(n, bs, lengths):
    dls = DataLoaders.in_memory(tiny(n), bs, drop_last=True)
    assert [len(yb) for _, yb in dls.train] == lengths and len(dls.train) == len(lengths)
    assert sum(len(yb) for _, yb in dls.valid) == 11


def test_memory_batches_are_copies():
    dls = DataLoaders.in_memory(tiny(), 8)
    for dl in (dls.train, dls.valid):
        want = {nm: o.clone() for nm, o in dl.columns.items()}
        for xb, yb in dl: xb.zero_(); yb.zero_()
        assert all(torch.equal(o, want[nm]) for nm, o in dl.columns.items())


def test_memory_two_loops_at_once():
    dl = DataLoaders.in_memory(tiny(), 8).train
    pairs = list(zip(dl, dl))
    assert len(pairs) == 5
    for o in (0, 1): assert sum(len(pair[o][1]) for pair in pairs) == 37


def test_memory_chooses_and_orders_columns():
    dd = tiny()
    dd = DatasetDict({nm: ds.add_column('weight', np.arange(len(ds))/3) for nm, ds in dd.items()})
    yb, xb = next(iter(DataLoaders.in_memory(dd, 8, columns=['label', 'image']).train))
    assert xb.shape == (8, 1, 28, 28) and yb.shape == (8,)
    both = DataLoaders.from_dd(dd, 8), DataLoaders.in_memory(dd, 8)
    same_batches(*(list(dls.valid) for dls in both))


def encoded(images):
    "Images as `datasets` keeps them."
    def file(im):
        res = io.BytesIO()
        im.save(res, 'PNG')
        return dict(bytes=res.getvalue(), path=None)
    ds = Dataset.from_dict(dict(image=[file(o) for o in images]), features=Features(image=Image()))
    return DatasetDict(train=ds, test=ds)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', '1', 'LA', 'P'])
def test_memory_modes(mode):
    dd = encoded([PILImage.fromarray(colour).convert(mode)]*3)
    same_batches(list(DataLoaders.in_memory(dd, 2).train), list(DataLoaders.from_dd(dd, 2).train))


def test_memory_refuses_uneven_images():
    dd = encoded([PILImage.new('L', (28, 28)), PILImage.new('L', (28, 20))])
    with pytest.raises(ValueError, match=r'image 1 has shape \(1, 20, 28\).*image 0 has \(1, 28, 28\)'):
        DataLoaders.in_memory(dd, 2)
    with pytest.raises(ValueError, match="'image' makes no batch"): list(DataLoaders.from_dd(dd, 2).train)


def test_memory_refuses_wide_pixels():
    dd = encoded([PILImage.fromarray(grey.astype(np.uint16))]*2)
    with pytest.raises(TypeError, match='image 0 has mode I;16'): DataLoaders.in_memory(dd, 2)


def test_memory_refuses_missing_values():
    ds = Dataset.from_dict(dict(label=[1, None]), features=Features(label=Value('int64')))
    with pytest.raises(ValueError, match="'label' makes no batch"):
        DataLoaders.in_memory(DatasetDict(train=ds, test=ds), 2)


def test_memory_refuses_what_it_cannot_keep():
    ds = Dataset.from_dict(dict(a=np.ones((2, 3, 3)), b=['x', 'y']),
                           features=Features(a=Array2D((3, 3), 'float32'), b=Value('string')))
    dd = DatasetDict(train=ds, test=ds)
    with pytest.raises(TypeError, match="column 'a' is Array2D"): DataLoaders.in_memory(dd, 2)
    with pytest.raises(TypeError, match="column 'b' is Value"): DataLoaders.in_memory(dd, 2, columns=['b'])
    with pytest.raises(KeyError, match="no column 'c'"): DataLoaders.in_memory(dd, 2, columns=['c'])


@pytest.mark.parametrize('change', [lambda dd: dd.with_transform(lambda b: b),
                                    lambda dd: dd.with_format('torch')])
def test_memory_refuses_a_transform(change):
    with pytest.raises(TypeError, match='applied only once'): DataLoaders.in_memory(change(tiny()), 4)


def no_decoding(*args): pytest.fail('decoded before the size was checked')


def test_memory_refuses_what_would_not_fit(monkeypatch):
    monkeypatch.setattr(mod, '_decode', no_decoding)
    need = 48*(784+8)
    with pytest.raises(MemoryError, match='48 samples take 3.8e-05 GB.*max_bytes allows'):
        DataLoaders.in_memory(tiny(), 4, max_bytes=need-1)
    monkeypatch.setattr(mod, '_free_bytes', lambda device: need-1)
    with pytest.raises(MemoryError, match='free on cpu'): DataLoaders.in_memory(tiny(), 4)
    monkeypatch.undo()
    assert len(DataLoaders.in_memory(tiny(), 4, max_bytes=need).train) == 10


def test_free_memory_is_known_on_linux():
    free = mod._free_bytes(torch.device('cpu'))
    assert free is None or 10**6 < free < 10**15


def seconds(dl, n):
    "Time of `n` batches."
    start = time.perf_counter()
    for _, _ in zip(range(n), dl): pass
    return time.perf_counter()-start


def test_memory_is_faster_than_items():
    dd = tiny(4000)
    memory, items = DataLoaders.in_memory(dd, 100).train, DataLoaders.from_dd(dd, 100).train
    assert min(seconds(memory, 40) for _ in range(3))*3 < min(seconds(items, 40) for _ in range(3))


def test_memory_loader_without_shuffle_keeps_the_order():
    dl = MemoryLoader(None, dict(label=torch.arange(7)), 3)
    assert [o[0].tolist() for o in dl] == [[0, 1, 2], [3, 4, 5], [6]]


@cuda
def test_memory_on_the_gpu_gives_the_same_bits():
    dd, runs = tiny(), []
    for device in ('cpu', 'cuda'):
        dls = DataLoaders.in_memory(dd, 8, device=device)
        torch.manual_seed(5)
        runs.append(list(dls.train))
        assert runs[-1][0][0].device.type == device
    same_batches(*runs)


@cuda
def test_gpu_batches_wait_for_nothing():
    dl = iter(DataLoaders.in_memory(tiny(), 8, device='cuda').train)
    next(dl)   # the epoch's order is made and moved here
    torch.cuda.set_sync_debug_mode('error')
    try: assert len(list(dl)) == 4
    finally: torch.cuda.set_sync_debug_mode('default')


def test_columns_of_objects_are_what_their_entries_are():
    "Numbers of classes stay whole, several types become floats, and a gap is named instead of a NaN."
    def made(X, y): return DataLoaders.from_arrays(np.array(X, object), np.array(y, object), valid=.5).train.columns
    assert (made([1, True, 2.5, 3], [0, 1, 2, 3])['x'].dtype, made([1, 2], [0, 1])['y'].dtype) == (torch.float32, torch.int64)
    for gap in None, 1j, '2':
        with pytest.raises(TypeError, match=f'X holds {gap!r} among others'): made([1, gap], [0, 1])
