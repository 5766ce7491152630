"""config.json: accepted and refused settings, and the published models in full size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from griffin.parallel.config import ATTENTION, RECURRENT, ModelConfig
from griffin.tools.weights.hf.config import model_of_config
from griffin.tools.weights.hf.names import transformers_axes, transformers_name, transformers_settings
from griffin.tools.weights.imported import model_tensors
from griffin.trainer.settings.presets import preset

# The published config.json files.
COMMON: dict[str, Any] = {
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "block_types": ["recurrent", "recurrent", "attention"],
    "bos_token_id": 2,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "logits_soft_cap": 30.0,
    "model_type": "recurrent_gemma",
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
    "w_init_variance_scale": 0.01,
}
PUBLISHED = {
    "2b": COMMON
    | {
        "hidden_size": 2560,
        "intermediate_size": 15360,
        "lru_width": 2560,
        "num_attention_heads": 10,
        "num_hidden_layers": 26,
    },
    "9b": COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 24576,
        "lru_width": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 38,
    },
}
TOTALS = {"2b": 2_682_862_080, "9b": 8_579_977_216}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_models(size: str) -> None:
    """Planned names and shapes are those of transformers, on meta tensors."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    model = model_of_config(PUBLISHED[size])
    assert model == preset(f"recurrentgemma-{size}")
    tensors = model_tensors(model)
    planned = {
        transformers_name(tensor.name): transformers_axes(tensor.name, len(tensor.shape)).foreign_shape(tensor.shape)
        for tensor in tensors
    }
    for settings in (PUBLISHED[size], transformers_settings(model)):
        with torch.device("meta"):
            peer = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**settings))
        expected = {name: tuple(value.shape) for name, value in peer.state_dict().items()}
        del expected["lm_head.weight"]
        assert planned == expected
        assert sum(parameter.numel() for parameter in peer.parameters()) == TOTALS[size]
    assert sum(math.prod(shape) for shape in planned.values()) == TOTALS[size]


SMALL: dict[str, Any] = {
    "model_type": "recurrent_gemma",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}


def test_defaults() -> None:
    """Missing keys take the published values, or derive from other widths; block types repeat and are cut off."""
    expected = ModelConfig(
        pattern=(RECURRENT, RECURRENT, ATTENTION, RECURRENT),
        width=32,
        recurrent_width=32,
        heads=4,
        head_dim=8,
        gate_blocks=4,
        mlp_expansion=2,
        window=2048,
        vocabulary=256_000,
        scale_embedding=True,
        logit_soft_cap=30.0,
    )
    assert model_of_config(SMALL) == expected
    assert model_of_config(SMALL | {"lru_width": None, "block_types": None, "head_dim": None}) == expected


@pytest.mark.parametrize("change", [{}, {"head_dim": 16}, {"lru_width": 48, "block_types": ["attention", "recurrent"]}])
def test_settings_round_trip(change: dict[str, Any]) -> None:
    model = model_of_config(SMALL | change)
    assert model_of_config({"model_type": "recurrent_gemma"} | transformers_settings(model)) == model


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}},
        {"rope_parameters": None},
    ],
)
def test_rotary_settings_wherever_they_stand(rope: dict[str, Any]) -> None:
    assert model_of_config(SMALL | rope) == model_of_config(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama': must be 'recurrent_gemma'"),
        ({"model_type": None}, "model_type = None: must be 'recurrent_gemma'"),
        ({"attention_bias": True}, "attention_bias = True: must be False, or left out"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2: must be 1 (left out, it is 4)"),
        ({"num_key_value_heads": None}, "num_key_value_heads = None: must be 1 (left out, it is 4)"),
        ({"conv1d_width": 3}, "conv1d_width = 3: must be 4"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu': must be 'gelu_pytorch_tanh'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: must be 1e-06"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0: must be 0.5"),
        ({"rope_theta": 1e6}, "rope_theta = 1000000.0: must be 10000"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta = 5.0: must be 10000"),
        ({"rope_parameters": {"partial_rotary_factor": 1}}, "rope_parameters.partial_rotary_factor = 1: must be 0.5"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn': must be 'default'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.rope_type = 'linear': must be 'default'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type = 'linear': must be 'default'"),
        ({"rope_parameters": 3}, "rope_parameters = 3: must be a table"),
        ({"rope_parameters": []}, "rope_parameters = []: must be a table"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention = {}: must be left out"),
        (
            {"attention_window_size": 12, "sliding_window": 7},
            "sliding_window = 7: must be attention_window_size = 12, or left out",
        ),
        ({"block_types": [["recurrent"]]}, "block_types = [['recurrent']]: must be a list of"),
        ({"logits_soft_cap": 10**400}, "logits_soft_cap = 1000"),
        ({"vocab_size": 10**30}, "vocab_size = 1" + 30 * "0" + ": must be an integer from 1 to 16777216"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: must be at most 100 times the"),
        ({"num_key_value_heads": True}, "num_key_value_heads = True: must be an integer"),
        ({"logits_soft_cap": 0.0}, "logits_soft_cap = 0.0: must be above 0"),
        ({"logits_soft_cap": None}, "logits_soft_cap = None: must be above 0"),
        ({"logits_soft_cap": float("nan")}, "logits_soft_cap = nan: must be above 0"),
        ({"intermediate_size": 129}, "intermediate_size = 129: must be a multiple of 2 x hidden_size = 64"),
        ({"intermediate_size": 96}, "intermediate_size = 96: must be a multiple of 2 x hidden_size = 64"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False: must be True"),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim = False: must be True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: must be None, or left out"),
        ({"block_types": ["recurrent", "mamba"]}, "block_types = ['recurrent', 'mamba']: must be a list of"),
        ({"block_types": []}, "block_types = []: must be a list of"),
        ({"lru_width": 34}, "lru_width = 34: must be a multiple of num_attention_heads = 4"),
        ({"head_dim": 6}, "head_dim = 6: must be a multiple of 4"),
        ({"hidden_size": 0}, "hidden_size = 0: must be an integer from 1 to 16777216"),
        ({"hidden_size": "32"}, "hidden_size = '32': must be an integer from 1 to 16777216"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None: must be an integer from 1 to 16777216"),
        ({"attention_window_size": -1}, "attention_window_size = -1: must be an integer from 1 to 16777216"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        model_of_config(SMALL | change)
    assert str(error.value).startswith(message)
