"""convert: against a re-derivation of the released converter's rule, read by the library."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import same_bits, tiny_config, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.folder import LOCK_FILE
from dsv3.checkpoint.index import converted_ranks
from dsv3.checkpoint.jobs import RECORD_FILE
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.safetensors_io import StreamWriter
from dsv3.config import QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow

# released word -> (short word, dimension that is cut)
RULE = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}


def by_the_rule(tensors, config, size, rank):
    """What one rank's file holds, from the description of the released converter."""
    out = {}
    per_rank = config.n_routed_experts // size
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{config.num_hidden_layers}."):
            continue
        words = name.removeprefix("model.").split(".")
        words = [
            {
                "self_attn": "attn",
                "mlp": "ffn",
                "weight_scale_inv": "scale",
                "e_score_correction_bias": "bias",
            }.get(word, word)
            for word in words
        ]
        words[-2], dim = RULE[words[-2]]
        if "experts" in words:
            if int(words[words.index("experts") + 1]) // per_rank != rank:
                continue
        elif dim is not None:
            tensor = tensor.chunk(size, dim)[rank]
        out[".".join(words)] = tensor
    return out


def run(in_dir, out_dir, tp, **options):
    return convert(in_dir, out_dir, tp, progress=False, **options)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"quantization_config": None}, {"tie_word_embeddings": True}],
)
def test_equals_the_released_rule(tmp_path, tp, changes):
    config = tiny_config(**changes)
    tensors = write_checkpoint(tmp_path / "in", config)
    run(tmp_path / "in", tmp_path / "out", tp)
    for rank in range(tp):
        found = load_file(tmp_path / "out" / f"model{rank}-mp{tp}.safetensors")
        expected = by_the_rule(tensors, config, tp, rank)
        assert set(found) == set(expected)
        assert all(same_bits(found[name], expected[name]) for name in found)
        with safe_open(tmp_path / "out" / f"model{rank}-mp{tp}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        [f"{kind}{rank}-mp{tp}.safetensors" for kind in ("model", "mtp") for rank in range(tp)]
        + ["config.json", "tokenizer_config.json"]
    )
    for name in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "in" / name).read_text()


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_keep_their_dtype(tmp_path, scale_dtype):
    config = tiny_config(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    tensors = write_checkpoint(tmp_path / "in", config, scale_dtype=scale_dtype)
    run(tmp_path / "in", tmp_path / "out", 2)
    found = load_file(tmp_path / "out" / "model1-mp2.safetensors")
    scale = tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    assert same_bits(found["layers.0.attn.wo.scale"], scale[:, 2:])


@pytest.mark.parametrize("tp", [1, 2])
def test_mtp_goes_to_its_own_file_without_copies(tmp_path, tp):
    tensors = write_checkpoint(tmp_path / "in", tiny_config())
    run(tmp_path / "in", tmp_path / "out", tp)
    found = [load_file(tmp_path / "out" / f"mtp{rank}-mp{tp}.safetensors") for rank in range(tp)]
    assert all(name.startswith("mtp.0.") for f in found for name in f)
    assert not any(name in f for f in found for name in ("mtp.0.embed.weight", "mtp.0.head.weight"))
    for f in found:
        assert same_bits(f["mtp.0.eh_proj.weight"], tensors["model.layers.2.eh_proj.weight"])
        assert same_bits(f["mtp.0.norm.weight"], tensors["model.layers.2.shared_head.norm.weight"])
    w2 = torch.cat([f["mtp.0.ffn.shared_experts.w2.weight"].view(torch.uint8) for f in found], 1)
    assert torch.equal(
        w2, tensors["model.layers.2.mlp.shared_experts.down_proj.weight"].view(torch.uint8)
    )
    experts = [name for f in found for name in f if ".experts." in name and "w1.weight" in name]
    assert sorted(experts) == [f"mtp.0.ffn.experts.{e}.w1.weight" for e in range(4)]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_converted_folder_loads_as_the_released_one(tmp_path, tp):
    write_checkpoint(tmp_path / "in", tiny_config())
    run(tmp_path / "in", tmp_path / "out", tp)
    assert converted_ranks(tmp_path / "out") == tp and converted_ranks(tmp_path / "in") is None
    for rank in range(tp):
        group = TensorGroup(rank, tp)
        a = load_model(tmp_path / "in", group=group).state_dict()
        b = load_model(tmp_path / "out", group=group).state_dict()
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_what_the_released_converter_made_loads_without_mtp(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config())
    run(tmp_path / "in", tmp_path / "out", 1)
    (tmp_path / "out" / "mtp0-mp1.safetensors").unlink()
    assert len(load_model(tmp_path / "out").mtp) == 0


def test_another_number_of_ranks_is_refused(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config())
    run(tmp_path / "in", tmp_path / "out", 2)
    with pytest.raises(DSV3Error, match="another number of ranks.*found 2, expected 1"):
        load_model(tmp_path / "out")
    with pytest.raises(DSV3Error, match="cannot be split over 3"):
        run(tmp_path / "in", tmp_path / "out3", 3)
    with pytest.raises(DSV3Error, match="inside an FP8 block"):
        write_checkpoint(tmp_path / "odd", tiny_config(intermediate_size=640))
        run(tmp_path / "odd", tmp_path / "out3", 2)
    assert not (tmp_path / "out3").exists()


def test_dry_run_plans_and_writes_nothing(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", tiny_config())
    plan = convert(tmp_path / "in", tmp_path / "out", 2, dry_run=True)
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().err
    assert "model1-mp2.safetensors" in text and "free on the disk" in text
    run(tmp_path / "in", tmp_path / "out", 2)
    for file in plan["files"]:
        tensors = load_file(tmp_path / "out" / file["name"])
        assert file["tensors"] == len(tensors)
        assert file["bytes"] == sum(t.nbytes for t in tensors.values())
    assert plan["bytes"] == sum(file["bytes"] for file in plan["files"])


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", tiny_config())
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), {"free": 1000}))
    with pytest.raises(DSV3Error, match="not enough space"):
        run(tmp_path / "in", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_output_folder_in_use(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config())
    with pytest.raises(DSV3Error, match="not empty"):
        run(tmp_path / "in", tmp_path / "in", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(DSV3Error, match="not a folder"):
        run(tmp_path / "in", tmp_path / "file", 2)


KILLED = """
import os, signal, sys
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.safetensors_io import StreamWriter
from dsv3.checkpoint.index import converted_ranks

write = StreamWriter.write
def deadly(self, name, value, first_row=0):
    write(self, name, value, first_row)
    if self.path.name.startswith("model1") and name == "layers.1.attn.wo.weight":
        os.kill(os.getpid(), signal.SIGKILL)
StreamWriter.write = deadly
convert(sys.argv[1], sys.argv[2], 2, progress=False)
"""


def test_resume_after_a_kill(tmp_path, monkeypatch):
    tensors = write_checkpoint(tmp_path / "in", tiny_config())
    out = tmp_path / "out"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "in", out], timeout=60, cwd=root
    )
    assert done.returncode == -signal.SIGKILL
    left = sorted(os.listdir(out))
    assert left == [
        LOCK_FILE,
        RECORD_FILE,
        "model0-mp2.safetensors",
        "model1-mp2.safetensors.partial",
        "mtp0-mp2.safetensors",
    ]
    with pytest.raises(DSV3Error, match="unfinished here, convert --tp 2.*start it again"):
        load_model(out, group=TensorGroup(0, 2))
    with pytest.raises(DSV3Error, match="unfinished job"):
        run(tmp_path / "in", out, 4)

    # A file that is not what was planned is written again; a finished one is not.
    save_file({"other": torch.ones(2)}, out / "mtp0-mp2.safetensors")
    written = []
    start = StreamWriter.__init__
    monkeypatch.setattr(
        StreamWriter,
        "__init__",
        lambda self, path, tensors: (written.append(path.name), start(self, path, tensors))[1],
    )
    run(tmp_path / "in", out, 2)
    assert written == ["mtp0-mp2.safetensors", "model1-mp2.safetensors", "mtp1-mp2.safetensors"]
    assert len(os.listdir(out)) == 6 and RECORD_FILE not in os.listdir(out)
    for rank in range(2):
        found = load_file(out / f"model{rank}-mp2.safetensors")
        expected = by_the_rule(tensors, tiny_config(), 2, rank)
        assert all(same_bits(found[name], expected[name]) for name in expected)


def test_other_input_is_not_resumed(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", tiny_config())
    write = StreamWriter.write

    def interrupted(self, name, value, first_row=0):
        if self.path.name.startswith("model1"):
            raise KeyboardInterrupt
        write(self, name, value, first_row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamWriter, "write", interrupted)
        run(tmp_path / "in", tmp_path / "out", 2)
    assert sorted(os.listdir(tmp_path / "out")) == [
        RECORD_FILE,
        "model0-mp2.safetensors",
        "mtp0-mp2.safetensors",
    ]
    write_checkpoint(tmp_path / "in", tiny_config(), seed=1)
    with pytest.raises(DSV3Error, match="other input"):
        run(tmp_path / "in", tmp_path / "out", 2)


def test_a_failure_in_the_first_file_leaves_nothing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", tiny_config())

    def fails(self, name, value, first_row=0):
        raise DSV3Error("cannot be written")

    monkeypatch.setattr(StreamWriter, "write", fails)
    with pytest.raises(DSV3Error):
        run(tmp_path / "in", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_config_of_the_output_is_the_input(tmp_path):
    config = tiny_config()
    write_checkpoint(tmp_path / "in", config)
    data = json.loads((tmp_path / "in" / "config.json").read_text()) | {"unknown_field": [1, 2]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(data))
    run(tmp_path / "in", tmp_path / "out", 1)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == data
