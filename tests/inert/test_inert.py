import collections
import io
import pickle
import random
import re
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from scoresde.checkpoint import CheckpointError
from scoresde.inert import (
    Persistent,
    bytes_of_file,
    init_args,
    read_persistent,
    read_torch,
    state_dict,
    unpickle,
)

BLOB = b"ctorch.storage\n_load_from_bytes\n"


def same(read, saved):
    """Equal values of the same plain types, `saved` after NumPy's and torch's wrappers."""
    if isinstance(saved, np.generic):
        saved = saved.item()
    if isinstance(saved, np.ndarray):
        saved = torch.tensor(saved)
    if isinstance(saved, torch.Tensor):
        assert type(read) is torch.Tensor
        assert not read.requires_grad
        assert (read.dtype, read.shape) == (saved.dtype, saved.shape)
        assert read.numel() == 0 or torch.equal(read, saved.detach())
    elif isinstance(saved, dict):
        assert type(read) is dict
        assert list(read) == list(saved)
        for key in saved:
            same(read[key], saved[key])
    elif isinstance(saved, list | tuple):
        assert len(read) == len(saved)
        assert type(read) in (list, tuple)
        for a, b in zip(read, saved, strict=True):
            same(a, b)
    else:
        assert type(read) is type(saved)
        assert read == saved


def song_like():
    """What the checkpoints of score_sde_pytorch hold: optimizer, list of averages, buffers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net.register_buffer("sigmas", torch.linspace(0, 1, 5, dtype=torch.float64))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    net(torch.randn(6, 3)).sum().backward()
    optimizer.param_groups[0]["lr"] = 2e-4 * np.minimum(3 / 5, 1.0)
    optimizer.step()
    shadow = [p.clone().detach() for p in net.parameters()]
    return {
        "optimizer": optimizer.state_dict(),
        "model": net.state_dict(),
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadow},
        "step": 3,
    }


def assorted():
    base = torch.arange(24.0)
    return {
        "view": base.view(2, 3, 4).permute(2, 0, 1),
        "shared": base[4:9],
        "parameter": nn.Parameter(torch.ones(2)),
        "half": torch.ones(3, dtype=torch.float16),
        "bfloat": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "int": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "complex": torch.tensor([1 + 2j]),
        "eight": torch.ones(2).to(torch.float8_e4m3fn).view(torch.uint8),
        "dtype": torch.float16,
        "device": torch.device("cuda:0"),
        "size": torch.Size([2, 3]),
        "set": {"a", "b"},
        "bytes": b"\x00\xff",
        "big": -(1 << 70),
        "none": [None, True, 1.5, "ü", ()],
        "numpy": [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(0.1)],
        "arrays": [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3)[:2]), np.array(2)],
        "swapped": np.arange(3, dtype=">i4").astype("i4"),
    }


def stream(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}


def fragments(body):
    return b"\x80\x02" + body + b"."


def archive(path, data, storages=None, top="archive", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{top}/data.pkl", data)
        for key, content in (storages or {}).items():
            file.writestr(f"{top}/data/{key}", content)
    return path


def tensor_code(numel=4, offset=0, size=(4,), stride=(1,), kind=b"Float", key=b"0"):
    """The opcodes that torch writes for a tensor, of any description."""

    def whole(n):
        raw = n.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw

    def row(values):
        return b"(" + b"".join(map(whole, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\n" + kind + b"Storage\n"
    storage += b"X" + struct.pack("<I", len(key)) + key + b"X\x03\0\0\0cpu" + whole(numel) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage + whole(offset) + row(size) + row(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


@pytest.fixture
def edm(monkeypatch):
    """Modules of the original's names, with a class written as its decorator writes them."""
    calls = []

    def _reconstruct_persistent_obj(meta):
        calls.append(meta)

    def touch(*args):
        calls.append(args)

    class EasyDict(dict):
        pass

    class Net(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self._init_args, self._init_kwargs = args, kwargs

        def __reduce__(self):
            meta = {
                "type": "class", "version": 6, "class_name": type(self).__name__,
                "module_src": "raise SystemExit('ran')", "state": dict(self.__dict__),
            }  # fmt: skip
            return _reconstruct_persistent_obj, (meta,), None

    for name, held in {
        "torch_utils.persistence": (_reconstruct_persistent_obj,),
        "dnnlib.util": (EasyDict,),
        "canary": (touch,),
    }.items():
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        monkeypatch.setitem(sys.modules, name, module)
        for value in held:
            value.__module__, value.__qualname__ = name, value.__name__
            setattr(module, value.__name__, value)
    yield types.SimpleNamespace(calls=calls, EasyDict=EasyDict, Net=Net)
    assert calls == []  # nothing of a file was ever called, in any test


def network(edm):
    torch.manual_seed(0)
    inner = edm.Net(8, heads=2)
    inner.weight = nn.Parameter(torch.randn(3, 2))
    inner.register_parameter("bias", None)
    inner.register_buffer("resample_filter", torch.ones(1, 1, 2, 2))
    inner.register_buffer("cache", torch.zeros(3), persistent=False)
    inner.sigma, inner.dtype = np.float64(0.5), torch.float16
    outer = edm.Net(resolution=16, mult=[1, 2], options=edm.EasyDict(a=1))
    outer.enc = nn.ModuleDict({"16x16_conv": inner, "list": nn.ModuleList([nn.Linear(2, 2)])})
    outer.nothing = None
    outer._modules["absent"] = None
    outer.scale = nn.Parameter(torch.tensor(2.0))
    outer.large = nn.Parameter(torch.randn(200, 100))  # more bytes than are kept in memory
    outer.table = np.arange(20_000.0).reshape(2, -1)
    return outer


@pytest.mark.parametrize("options", [{}, OLD, {"pickle_protocol": 4}], ids=["zip", "old", "p4"])
@pytest.mark.parametrize("content", [song_like, assorted])
def test_files_of_torch_save_come_back_plain(tmp_path, content, options):
    saved = content()
    torch.save(saved, tmp_path / "x.pth", **options)
    read = read_torch(tmp_path / "x.pth")
    for value in (read, saved):
        if "set" in value:
            assert value.pop("set") == {"a", "b"}
    same(read, saved)
    torch.save([torch.ones(2)] * 2, tmp_path / "y.bin", **options)
    same(read_torch(str(tmp_path / "y.bin")), [torch.ones(2)] * 2)


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_new_types_and_shared_memory_are_kept(tmp_path, options):
    base = torch.arange(6.0)
    content = [base, base[2:4], torch.ones(3, dtype=torch.uint16), torch.ones(2).float()]
    torch.save(content, tmp_path / "x.pt", **options)
    read = read_torch(tmp_path / "x.pt")
    same(read, content)
    read[0][2] = 50  # writes to memory, never to the file
    assert read[1][0] == 50
    same(read_torch(tmp_path / "x.pt"), content)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_both_spellings_of_numpy_are_known(tmp_path, core):
    body = b"c" + core + b".multiarray\nscalar\ncnumpy\ndtype\nX\x02\0\0\0f8\x89\x88\x87R"
    body += b"(K\x03X\x01\0\0\0>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbC\x08"
    path = archive(tmp_path / "x", fragments(body + struct.pack(">d", 0.3) + b"\x86R"))
    assert read_torch(path) == 0.3


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_network_pickle_is_read_without_its_code(tmp_path, edm, protocol):
    net = network(edm)
    content = {"ema": net, "augment_pipe": None, "dataset_kwargs": edm.EasyDict(path="x")}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    before = set(sys.modules), torch.serialization.get_safe_globals()
    read = read_persistent(tmp_path / "x.pkl")
    assert (set(sys.modules), torch.serialization.get_safe_globals()) == before
    assert read["dataset_kwargs"] == {"path": "x"}
    assert type(read["dataset_kwargs"]) is dict
    ema = read["ema"]
    assert (type(ema), ema.class_name) == (Persistent, "Net")
    assert "raise" not in repr(vars(ema))
    assert init_args(ema) == {"resolution": 16, "mult": [1, 2], "options": {"a": 1}}
    same(state_dict(ema), expected)
    enc = ema.state["_modules"]["enc"]
    assert enc.class_name == "torch.nn.modules.container.ModuleDict"
    inner = enc.state["_modules"]["16x16_conv"]
    assert init_args(inner) == {"heads": 2, "_init_args": [8]}
    assert inner.state["sigma"] == 0.5
    assert inner.state["dtype"] is torch.float16
    same(ema.state["table"], net.table)


def test_one_array_in_two_places_stays_one(tmp_path):
    array = np.ones((2, 3))
    for protocol in (2, 4, 5):
        (tmp_path / "x").write_bytes(
            pickle.dumps([array, array, array.dtype, array.dtype], protocol)
        )
        a, b, *_ = read_persistent(tmp_path / "x")
        assert type(a) is torch.Tensor
        assert a is b


def test_large_tensors_are_never_held_twice(tmp_path, edm, monkeypatch):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(nn.Parameter(torch.randn(300, 1000))))
    sizes, plain = [], bytes_of_file.Window.read
    monkeypatch.setattr(
        bytes_of_file.Window, "read", lambda self, n: sizes.append(n) or plain(self, n)
    )
    assert read_persistent(tmp_path / "x.pkl").shape == (300, 1000)
    assert max(sizes) <= unpickle.IN_MEMORY


def test_real_files_load(original):
    home = original("edm_ddpmpp_cond").parent
    files = [p for n in ("*.pth", "*.pt", "*.pkl") for p in home.glob(f"*/{n}")]
    assert len(files) >= 3
    for path in files:
        if path.suffix == ".pkl":
            ema = read_persistent(path)["ema"]
            assert init_args(ema)["img_channels"] == 3
            assert all(v.isfinite().all() for v in state_dict(ema).values())
        else:
            same(read_torch(path), torch.load(path, weights_only=False))


CALL = b"X\x01\0\0\0x\x85R"
GLOBALS = {
    "posix.system": b"cposix\nsystem\n" + CALL,
    "canary.touch": b"ccanary\ntouch\n" + CALL,
    "os.system": b"\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93" + CALL,
    "builtins.eval": b"\x8c\x08builtins\x8c\x04eval\x93" + CALL,
    "builtins.getattr": b"cbuiltins\ngetattr\n" + CALL,
    "__builtin__.exec": b"c__builtin__\nexec\n" + CALL,
    "collections.OrderedDict.__class__": b"\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93)R",
    "collections.OrderedDict.update": b"ccollections.OrderedDict\nupdate\n)R",
    "copyreg._reconstructor": b"ccopyreg\n_reconstructor\n)R",
    "functools.partial": b"cfunctools\npartial\n)R",
    "subprocess.Popen": b"csubprocess\nPopen\nX\x01\0\0\0x\x85\x81",
    "torch.load": b"ctorch\nload\n" + CALL,
    "builtins.bytearray": b"cbuiltins\nbytearray\nJ\0\0\0\x40\x85R",
    "torch.FloatTensor": b"ctorch\nFloatTensor\nJ\0\0\0\x40\x85R",
    "torch._utils._rebuild_wrapper_subclass": b"ctorch._utils\n_rebuild_wrapper_subclass\n)R",
    "pickle.loads": b"cpickle\nloads\n" + CALL,
    "nt.system": b"(int\nsystem\n",
    "numpy.load": b"cnumpy\nload\n" + CALL,
    "torch.nn.modules.linear.Linear.forward": (
        b"\x8c\x17torch.nn.modules.linear\x8c\x0eLinear.forward\x93)R"
    ),
    "torch.nn.modules.x.y": b"\x8c\x10torch.nn.modules\x8c\x03x.y\x93)R",
    r"posix\\n.system": b"\x8c\x06posix\n\x8c\x06system\x93)R",
}


def containers(tmp_path, code):
    """One hostile pickle in each place where a pickle can hide, with the reader of each."""
    hostile = fragments(b"]" + code + b"a")
    old = stream([], **OLD)
    at = old.index(b"\x80\x02]q\x00.")
    yield read_torch, archive(tmp_path / "a.pth", hostile)
    (tmp_path / "b.pth").write_bytes(old[:at] + hostile + old[at + 6 :])
    yield read_torch, tmp_path / "b.pth"
    (tmp_path / "c.pth").write_bytes(hostile)
    yield read_torch, tmp_path / "c.pth"
    (tmp_path / "d.pkl").write_bytes(hostile)
    yield read_persistent, tmp_path / "d.pkl"
    for size in (0, unpickle.IN_MEMORY):  # inner streams in memory, and left in the file
        inner = old[:at] + hostile + old[at + 6 :] + bytes(size)
        nested = BLOB + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R"
        (tmp_path / "e.pkl").write_bytes(fragments(nested))
        yield read_persistent, tmp_path / "e.pkl"


def refused(read, path, reason=""):
    """The one line of the error; any other error, or none, fails."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert re.search(reason, message), message
    return message


@pytest.mark.parametrize("name", GLOBALS)
def test_other_globals_are_refused_by_name(tmp_path, edm, name):
    for read, path in containers(tmp_path, GLOBALS[name]):
        refused(read, path, re.escape(f"needs the global {name},") if "\\" not in name else name)


def test_pickles_without_a_protocol_are_named_too(tmp_path, edm):
    (tmp_path / "x").write_bytes(b"cposix\nsystem\n(S'x'\ntR.")
    for read in (read_torch, read_persistent):
        refused(read, tmp_path / "x", r"global posix\.system,")


OD = b"ccollections\nOrderedDict\n"
DTYPE = b"cnumpy\ndtype\nX\x02\0\0\0f8\x89\x88\x87R"
ND = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
TRICKS = {
    "state of a class": (OD + b"}X\x08\0\0\0__init__K\x01sb", "sets the state of collections"),
    "slots of a class": (OD + b"N}X\x08\0\0\0__init__K\x01s\x86b", "sets the state of collect"),
    "slots of a dict": (OD + b")RN}X\x06\0\0\0updateK\x01s\x86b", "sets the state of"),
    "state of a list": (b"]}b", "sets the state of"),
    "state of a number": (b"K\x01}b", "sets the state of"),
    "call of text": (b"X\x01\0\0\0x)R", "calls an object of type str"),
    "call of a dict": (b"})R", "calls an object of type dict"),
    "call without a tuple": (OD + b"]R", "calls"),
    "call with arguments": (OD + b"K\x01\x85R", "argument"),
    "new object of a type": (b"ctorch\nfloat32\n)\x81", "calls an object of type dtype"),
    "new object of a storage": (b"ctorch\nFloatStorage\n)\x81", "calls"),
    "new array": (b"cnumpy\nndarray\n)\x81", r"calls numpy\.ndarray"),
    "array of another class": (
        b"cnumpy.core.multiarray\n_reconstruct\n" + OD + b"K\0\x85C\x01b\x87R", "unknown class"
    ),
    "type of objects": (b"cnumpy\ndtype\nX\x02\0\0\0O8\x89\x88\x87R", "type 'O8' of NumPy"),
    "type of records": (DTYPE + b"(K\x03X\x01\0\0\0|NX\x01\0\0\0a}K\0K\0K\0tb", "structured"),
    "array of a list": (ND + b"(K\x01K\x01\x85" + DTYPE + b"\x89]tb", "array of objects"),
    "array without type": (ND + b"(K\x01K\x01\x85K\0\x89C\x01atb", "array of objects"),
    "array too small": (ND + b"(K\x01K\x09\x85" + DTYPE + b"\x89C\x01atb", "in 1 bytes"),
    "key that hashes slowly": (b"})]\x86K\x01s", "as a key"),
    "member that hashes slowly": (b"\x8f()K\x01\x86\x90", "as a key"),
    "items of a tuple": (b")K\x01a", "puts items into an object of type tuple"),
    "items of a class": (OD + b"K\x01K\x01s", "puts items into collections"),
    "odd items": (b"}(K\x01u", "damaged"),
    "unknown memo": (b"h\x05", "damaged"),
    "extension": (b"\x82\x05", "opcode"),
    "popped": (b"K\x010", "opcode"),
    "next buffer": (b"\x97", "opcode"),
    "left over": (b"K\x01K\x02", "puts items into"),
    "a module of code": (b"(X\x06\0\0\0moduleX\x01\0\0\0xNNtQ", "outside of its pickle"),
    "a module like a storage": (
        b"(X\x06\0\0\0modulectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ",
        "outside of its pickle",
    ),
    "global of numbers": (b"K\x01K\x01\x93", "not text"),
    "no device": (b"ctorch\ndevice\nK\0\x85R", "device"),
    "unknown device": (b"ctorch\ndevice\nX\x01\0\0\0x\x85R", "damaged"),
    "endless name": (b"c" + b"a" * 5000 + b"\nx\n", "without an end"),
    "encoded text": (b"c_codecs\nencode\nX\x01\0\0\0xX\x03\0\0\0hex\x86R", "encodes"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_with_known_globals_reach_nothing(tmp_path, edm, name):
    code, reason = TRICKS[name]
    before = dict(vars(collections.OrderedDict))
    for read, path in containers(tmp_path, code):
        refused(read, path, reason)
    assert dict(vars(collections.OrderedDict)) == before


def test_objects_of_network_pickles_keep_to_themselves(tmp_path):
    def read(code):
        (tmp_path / "x.pkl").write_bytes(fragments(code))
        return read_persistent(tmp_path / "x.pkl")

    module = b"ctorch.nn.modules.linear\nLinear\n)\x81"
    made = read(module + b"}(X\x0c\0\0\0__setstate__K\x01X\x09\0\0\0__class__K\x02ub")
    assert type(made) is Persistent
    assert made.state == {"__setstate__": 1, "__class__": 2}
    recon = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
    for code, reason in {
        module + b"N}X\x01\0\0\0aK\x01s\x86b": "sets the state of a torch",
        module + b"}X\x01\0\0\0aK\x01sb}b": "sets the state of a torch",
        b"ctorch.nn.modules.linear\nLinear\n}b": "sets the state of torch.nn",
        b"ctorch.nn.modules.linear\nLinear\nK\x01\x85R": "argument",
        recon + b"}\x85R": "without a class or a state",
        recon + b"K\x01\x85R": "damaged",
        recon + b"}b": "sets the state of",
        BLOB + b"K\x01\x85R": "bytes of a tensor are none",
        BLOB + b"C\x02ab\x85R": "damaged",
        b"K\x01K\x02": "left over",
        b"K\x01(N": "left over",
        b"(X\x07\0\0\0storagetQ": "outside of its pickle",
    }.items():
        (tmp_path / "x.pkl").write_bytes(fragments(code))
        refused(read_persistent, tmp_path / "x.pkl", reason)
    blob = stream([torch.ones(1)], **OLD)
    (tmp_path / "x.pkl").write_bytes(
        fragments(BLOB + b"B" + struct.pack("<I", len(blob)) + blob + b"\x85R")
    )
    refused(read_persistent, tmp_path / "x.pkl", "hold something else")


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"numel": 5}, "declares 20 bytes for the storage 0, of which it holds 16"),
        ({"numel": 1 << 60}, "of which it holds 16"),
        ({"numel": -4}, "description of a storage"),
        ({"size": (5,)}, r"size \(5,\) that exceeds its storage of 4"),
        ({"size": (2,), "stride": (4,)}, "exceeds"),
        ({"offset": 1}, "exceeds"),
        ({"offset": -1}, "no whole numbers"),
        ({"offset": 1 << 62, "size": (1,)}, "exceeds"),
        ({"size": (-1,)}, "no whole numbers"),
        ({"stride": (-1,)}, "no whole numbers"),
        ({"size": (1 << 40,), "stride": (0,)}, "exceeds"),
        ({"size": (1 << 62, 1 << 62), "stride": (0, 0)}, "exceeds"),
        ({"size": (2, 2)}, "other numbers of sizes"),
        ({"size": (1,) * 65, "stride": (1,) * 65}, "no whole numbers"),
        ({"key": b"1"}, "the storage 1, of which it holds no"),
        ({"key": b"../x"}, "of which it holds no"),
        ({"kind": b"QInt8"}, "global torch.QInt8Storage"),
    ],
)
def test_a_tensor_must_lie_in_its_storage(tmp_path, described, reason):
    good = {"size": (2, 2), "stride": (1, 2)}
    data = np.arange(4, dtype="f4").tobytes()
    path = archive(tmp_path / "x", fragments(tensor_code(**good)), {"0": data})
    assert torch.equal(read_torch(path), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    path = archive(tmp_path / "x", fragments(tensor_code(**described)), {"0": data})
    refused(read_torch, path, reason)


@pytest.mark.parametrize("numel", [5, 3, 1 << 60, 0])
def test_storages_of_a_stream_have_the_declared_size(tmp_path, numel):
    old = stream(torch.arange(4.0), **OLD)
    assert old.count(b"\x04\0\0\0\0\0\0\0") == 1
    (tmp_path / "x").write_bytes(old.replace(b"\x04\0\0\0\0\0\0\0", struct.pack("<Q", numel)))
    refused(read_torch, tmp_path / "x", "damaged")
    head = old[: old.index(b"\x80\x02ctorch._utils")]
    code = tensor_code(numel=numel, size=(1,))
    tail = old[old.rindex(b"\x80\x02]") :]
    (tmp_path / "x").write_bytes(head + fragments(code) + tail)
    refused(read_torch, tmp_path / "x", "declares|damaged")


BOMBS = {
    "long bytes": b"\x8e" + struct.pack("<Q", 1 << 62),
    "long bytearray": b"\x96" + struct.pack("<Q", 1 << 40),
    "long text": b"X\xff\xff\xff\xff",
    "negative text": b"T\xff\xff\xff\xff",
    "long number": b"\x8b\xff\xff\xff\x7f",
    "same text encoded": (
        b"c_codecs\nencode\nq\0X\x00\x10\0\0" + b"a" * 4096 + b"q\x01X\x06\0\0\0latin1q\x020"[:-1]
        + b"(" + b"h\0h\x01h\x02\x86R" * 99 + b"t"
    ),
    "same set": b"cbuiltins\nset\nq\0](" + b"K\x01" * 3000 + b"eq\x01(" + b"h\0h\x01\x85R" * 99,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_no_memory(tmp_path, edm, name):
    for read, path in containers(tmp_path, BOMBS[name]):
        refused(read, path, "declared|opcode|more memory")


def test_one_tensor_named_many_times_takes_no_more_than_the_file(tmp_path):
    for n in (10, 30_000):  # bytes kept in memory, and left in the file
        blob = stream(torch.zeros(n).untyped_storage(), **OLD)
        code = BLOB + b"q\0B" + struct.pack("<I", len(blob)) + blob + b"q\x01"
        (tmp_path / "x").write_bytes(fragments(code + b"(" + b"h\0h\x01\x85R" * 50 + b"t"))
        refused(read_persistent, tmp_path / "x", "more memory")
        array = b"B" + struct.pack("<I", 8 * n) + bytes(8 * n) + b"q\x02"
        shape = b"M" + struct.pack("<H", n) + b"\x85"
        one = ND + b"(K\x01" + shape + DTYPE + b"\x89h\x02tb"
        (tmp_path / "x").write_bytes(fragments(b"(" + array + one * 9 + b"t"))
        if n > 10:
            refused(read_persistent, tmp_path / "x", "more memory")


def test_long_programs_and_deep_ones_end(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(fragments(b"K\x01\x85" + b"\x85" * 200_000))
    refused(read_persistent, tmp_path / "x", "without end")
    laughs = b"]q\0" + b"".join(b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" +
                                bytes([i + 1]) for i in range(60))  # fmt: skip
    (tmp_path / "x").write_bytes(fragments(b"(" + laughs + b"t"))
    refused(read_persistent, tmp_path / "x", "without measure")
    ring = b"]q\0h\0a"
    (tmp_path / "x").write_bytes(fragments(ring))
    refused(read_persistent, tmp_path / "x", "without end")
    refused(read_torch, archive(tmp_path / "y", fragments(ring)), "without end")
    shared = b"(]q\0K\x01a" + b"h\0" * 100 + b"t"
    (tmp_path / "x").write_bytes(fragments(shared))
    assert read_persistent(tmp_path / "x") == ([1],) * 101
    (tmp_path / "x").write_bytes(fragments(b"Nr\xff\xff\xff\xff"))
    assert read_persistent(tmp_path / "x") is None  # a place in the memo costs nothing
    monkeypatch.setattr(unpickle, "MAX_STEPS", 100)
    (tmp_path / "x").write_bytes(fragments(b"]" * 101))
    refused(read_persistent, tmp_path / "x", "more than 100 steps")


def test_modules_that_never_end_are_refused():
    def module(**parts):
        return Persistent("M", {"_parameters": {}, "_buffers": {}, "_modules": parts})

    ring = module()
    ring.state["_modules"]["a"] = ring
    with pytest.raises(CheckpointError, match="contains itself"):
        state_dict(ring)
    tower = module()
    for _ in range(40):
        tower = module(a=tower, b=tower)
    with pytest.raises(CheckpointError, match="more parts"):
        state_dict(tower)
    broken = module()
    broken.state["_parameters"]["a"] = 3
    twice, dotted = module(), module(a=module())
    twice.state["_parameters"]["a"] = twice.state["_buffers"]["a"] = torch.ones(1)
    dotted.state["_parameters"]["a.b"] = torch.ones(1)
    dotted.state["_modules"]["a"].state["_parameters"]["b"] = torch.ones(1)
    for wrong in (
        broken,
        twice,
        dotted,
        Persistent("M", {}),
        module(a={}),
        {},
        module(a=Persistent("N")),
    ):
        with pytest.raises(CheckpointError, match="pickle"):
            state_dict(wrong)
    for wrong in (module(), {}, None):
        with pytest.raises(CheckpointError, match="pickle"):
            init_args(wrong)


def test_the_archive_is_as_torch_writes_it(tmp_path):
    body, data = fragments(tensor_code()), {"0": np.arange(4, dtype="f4").tobytes()}
    path = tmp_path / "x.pth"
    archive(path, body, {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    refused(read_torch, path, "compressed")
    for name in ("../evil", "other/data/9", "archive/../../evil", "archive/a\\..\\b", "evil"):
        archive(path, body, data)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, b"x")
        refused(read_torch, path, "odd or repeated name")
    archive(path, body, data)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data/0", bytes(16))
    refused(read_torch, path, "odd or repeated name")
    archive(path, body, {**data, "byteorder": b""}, top="a")
    good = archive(path, body, {**data, "1": bytes(16)}).read_bytes()
    for field, value, reason in (
        (20, 1 << 30, "compressed"),
        (24, 1 << 30, "compressed"),
        (10, 8, "compressed"),
        (42, 1 << 30, "exceeds the file"),
        (42, 7, "not where it should be"),
        (8, 1, "encrypted"),
        (0, 0, "damaged"),
    ):
        at = good.rindex(b"PK\x01\x02") + field
        path.write_bytes(good[:at] + struct.pack("<I", value) + good[at + 4 :])
        refused(read_torch, path, reason)
    at = good.rindex(b"PK\x01\x02")
    bigger = good[:at] + good[at : at + 20] + struct.pack("<II", 99, 99) + good[at + 28 :]
    path.write_bytes(bigger)
    refused(read_torch, path, "exceeds the file")
    first = good.index(b"PK\x01\x02")
    path.write_bytes(good[: first + 20] + struct.pack("<II", 500, 500) + good[first + 28 :])
    refused(read_torch, path, "overlap|exceeds")
    for at, value in ((10, 60_000), (12, 1 << 31), (16, 1 << 31)):
        end = bytearray(good)
        struct.pack_into("<H" if at == 10 else "<I", end, len(good) - 22 + at, value)
        path.write_bytes(end)
        refused(read_torch, path, "directory")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b", b"x")
    refused(read_torch, path, r"without data\.pkl")


def test_records_that_overlap_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    inner = b"PK\x03\x04" + bytes(22) + struct.pack("<HH", 14, 0) + b"archive/data/1" + bytes(16)
    good = archive(path, fragments(b"N"), {"0": inner, "1": bytes(16)}).read_bytes()
    at = good.rindex(b"PK\x01\x02") + 42
    path.write_bytes(good[:at] + struct.pack("<I", good.index(inner)) + good[at + 4 :])
    refused(read_torch, path, "overlap")


def test_directories_of_64_bits_and_unaligned_records_are_read(tmp_path):
    data = np.arange(4, dtype="f4").tobytes()
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as record:
            record.write(fragments(tensor_code()))
        with file.open("archive/data/0", "w", force_zip64=True) as record:
            record.write(data)
    plain = path.read_bytes()
    at = plain.index(b"PK\x01\x02")
    end = len(plain) - 22
    count, size, start = struct.unpack("<HII", plain[end + 10 : end + 20])
    wide = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
    wide += b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1)
    tail = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    assert torch.equal(read_torch(path), torch.arange(4.0))
    pair = fragments(tensor_code() + tensor_code(size=(2,)) + b"\x86")
    a, b = read_torch(archive(tmp_path / "y.pth", pair, {"0": data}, top="un-aligned"))
    assert a.data_ptr() % 16 == 0
    b[0] = 9
    assert a[0] == 9
    path.write_bytes(plain[:end] + wide + tail)
    assert torch.equal(read_torch(path), torch.arange(4.0))
    last = plain.rindex(b"PK\x01\x02")
    name_end = last + 46 + 14
    sizes = struct.unpack("<II", plain[last + 20 : last + 28])
    header = struct.unpack("<I", plain[last + 42 : last + 46])
    entry = bytearray(plain[last:name_end])
    struct.pack_into("<II", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", entry, 30, 28)
    struct.pack_into("<I", entry, 42, 0xFFFFFFFF)
    entry += struct.pack("<HHQQQ", 1, 24, sizes[1], sizes[0], header[0])
    directory = plain[at:last] + bytes(entry)
    tail = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), at, 0)
    path.write_bytes(plain[:at] + directory + b"PK\x05\x06" + tail)
    assert torch.equal(read_torch(path), torch.arange(4.0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS"),
        (b"\n <!DOCTYPE html><html></html>", "web page"),
        (b"\x10\0\0\0\0\0\0\0{" + b" " * 20, "safetensors"),
        (b"hello world", "no checkpoint"),
        (b"PK", "truncated or damaged"),
        (b"PK\x05\x06" + bytes(18), "truncated or damaged|without data"),
        (b"\x80", "truncated or damaged|plain|archive"),
    ],
)
def test_files_that_are_no_checkpoints_are_told_apart(tmp_path, content, reason):
    (tmp_path / "x.pth").write_bytes(content)
    refused(read_torch, tmp_path / "x.pth", reason)
    refused(read_persistent, tmp_path / "x.pth", reason if content[:2] != b"PK" else "archive")


def test_missing_files_folders_and_the_wrong_reader(tmp_path, edm):
    for read in (read_torch, read_persistent):
        refused(read, tmp_path / "nothing.pth", "there is no such file")
        refused(read, tmp_path, "it is a folder")
    (tmp_path / "x").write_bytes(pickle.dumps({"a": 1}, 2))
    refused(read_torch, tmp_path / "x", "plain pickle, not a file of torch.save")
    (tmp_path / "x").write_bytes(stream({"a": 1}).replace(b"little", b"biggie"))
    refused(read_torch, tmp_path / "x", "byte order")


def valid(edm):
    small = {
        "w": torch.arange(6.0).view(2, 3),
        "lr": np.float64(0.1),
        "s": [nn.Parameter(torch.ones(2))],
    }
    yield read_torch, stream(small)
    yield read_torch, stream(small, **OLD)
    yield read_persistent, pickle.dumps({"ema": network(edm)}, 4)


def test_truncated_files_are_refused_wherever_they_end(tmp_path, edm):
    path = tmp_path / "x"
    for read, content in valid(edm):
        step = max(1, len(content) // 300)
        for stop in {*range(0, len(content), step), *range(len(content) - 60, len(content))}:
            path.write_bytes(content[:stop])
            refused(read, path)


def test_damaged_files_load_or_say_so(tmp_path, edm):
    draw = random.Random(0)
    path = tmp_path / "x"
    outcomes, lines = collections.Counter(), []
    for read, content in valid(edm):
        heads = [m.start() for m in re.finditer(rb"PK|torch|\x80|storage", content)]
        for case in range(150):
            damaged = bytearray(content)
            for _ in range(draw.choice((1, 1, 2, 8))):
                at = draw.randrange(len(content)) if case % 2 else draw.choice(heads)
                at = min(at + draw.randrange(40), len(content) - 1)
                damaged[at] = draw.choice((0, 255, damaged[at] ^ 1 << draw.randrange(8)))
            path.write_bytes(damaged)
            try:
                read(path)
                outcomes["loaded"] += 1
            except CheckpointError as error:
                lines.append(str(error))
                outcomes["refused"] += 1
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
    assert min(outcomes["loaded"], outcomes["refused"]) > 30
