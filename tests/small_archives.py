"Small pictures, and archives of them."

import io
import tarfile
import warnings
import zipfile

import numpy as np
from PIL import Image


def picture(seed, side=8, kind="PNG"):
    "The bytes of a picture of random pixels."
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def pack(path, files, compression=zipfile.ZIP_DEFLATED):
    "Write an archive of (name, bytes), in their order; the ending says which kind."
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that come twice
            for name, content in files:
                archive.writestr(name, content)
        return path
    kind = path.name.rpartition(".")[2].replace("tgz", "gz").replace("tar", "")
    with tarfile.open(path, f"w:{kind}") as archive:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def unpack(folder, files):
    "Write the same files into a folder."
    for name, content in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
