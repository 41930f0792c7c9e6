"""The checkpoint benchmark, shrunk: the same code on files that fit into seconds."""

import pytest
from checkpoints import tiny_config
from safetensors import safe_open

from benchmarks import sparse_671b
from dsv3.checkpoint.inspect import report
from dsv3.config import ModelConfig
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def few_layers():
    """True widths; the first MoE layer is the last."""
    return ModelConfig.deepseek_v3().but(num_hidden_layers=4, n_routed_experts=16, n_group=8)


def test_sparse_rehearsal(tmp_path, few_layers):
    result = sparse_671b.rehearse(tmp_path, few_layers, shards=7, ranks=8, layer=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7
    expected = report(tmp_path, ranks=8)
    assert result["inspect"] == expected and expected["bytes"] > 5e9
    assert result["bytes_on_disk"] < 2e6  # sparse: no disk is used
    assert len(result["convert"]["files"]) == 16  # model and mtp, for each of 8 ranks
    assert result["convert"]["bytes"] == sum(r["bytes"] for r in expected["per_rank"])
    by_dtype = expected["parameters"]["by_dtype"]
    moe_layers = 2  # layer 3 and the MTP module
    assert (
        result["cast"]["bytes"]
        == 2 * (by_dtype["F8_E4M3"] + by_dtype["BF16"]) + 4 * 16 * moe_layers
    )  # router biases stay float32
    assert not any((tmp_path / name).exists() for name in ("converted", "bf16"))
    with safe_open(tmp_path / "model-00003-of-000007.safetensors", "pt") as file:
        assert len(file.keys()) > 10  # the library accepts the headers


def test_one_rank_reads_less_than_a_layer(tmp_path):
    config = tiny_config()
    sparse_671b.write_sparse(tmp_path, config, 3)
    _, one = sparse_671b.load_layer(tmp_path, 1, TensorGroup(0, 1))
    _, quarter = sparse_671b.load_layer(tmp_path, 1, TensorGroup(3, 4))
    assert quarter < one / 2
