"""How the data set that is shipped was made, from the IDX files of Fashion-MNIST: `python tests/small_data.py FOLDER`.

6,000 training and 1,000 test images, the first of each class, as PNG in two Parquet files.
"""
import gzip, io, sys
from pathlib import Path

import numpy as np

from miniai.datasets import fashion_features, find_idx, idx_files, idx_folder, read_idx


def write_idx(path, values):
    "Write an IDX file of images or labels; gzipped if the name ends in .gz."
    values = np.ascontiguousarray(values, dtype=np.uint8)
    raw = np.array([{3: 2051, 1: 2049}[values.ndim], *values.shape], '>u4').tobytes() + values.tobytes()
    Path(path).write_bytes(gzip.compress(raw, 1, mtime=0) if str(path).endswith('.gz') else raw)


def first_of_each(labels, per_class):
    "Positions of the first `per_class` samples of each class, in order."
    labels = np.asarray(labels)
    return np.sort(np.concatenate([np.flatnonzero(labels == o)[:per_class] for o in range(10)]))


def png(image):
    "uint8 pixels [rows, columns] as the bytes of a PNG file, as small as PIL makes it."
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG', optimize=True)
    return file.getvalue()


def make_small(path):
    "Write the two Parquet files to the folder `path`."
    import pyarrow as pa
    import pyarrow.parquet as pq
    features = fashion_features()
    for split, per_class in (('train', 600), ('test', 100)):
        *names, count = idx_files[split]
        images, labels = (read_idx(find_idx(idx_folder, nm), kind, count) for nm, kind in zip(names, ('images', 'labels')))
        keep = first_of_each(labels, per_class)
        rows = pa.array([dict(bytes=png(images[o]), path=None) for o in keep], features['image'].pa_type)
        table = pa.table(dict(image=rows, label=pa.array(labels[keep].astype(np.int64)))).cast(features.arrow_schema)
        pq.write_table(table, Path(path)/f'fashion_mnist_small_{split}.parquet', compression='none')   # PNG is compressed


if __name__ == '__main__': make_small(sys.argv[1])
