"""What is captured from a cut LM is what a hook on the whole one sees, on every architecture."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import VOCABULARY, build, names
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from sae import UsageError
from sae.config import ModelConfig
from sae.lm.capture import Capture
from sae.lm.loading import find_hookpoints, freeze, load_lm
from sae.lm.probe import checked
from sae.lm.rows import first_tensor

TOKENS = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))

# In every run; all others by --architectures. MiniCPM3 scales its blocks by its depth, ESM-2 and
# Longformer have parts sized by it, RWKV divides by it, GPT-1 shares an activation, XLNet puts
# positions before sequences.
SOME = (
    *("llama", "gpt2", "gpt_neox", "opt", "gemma2", "minicpm3", "longformer", "rwkv"),
    *("openai-gpt", "xlnet", "qwen3_moe", "mamba", "bert"),
)

# They do not run on shapes alone, so how much of them is needed is not known before they are there.
LOADED_WHOLE = ("longformer", "xlnet")


def load(folder: Path, *hookpoints: str) -> tuple[PreTrainedModel, Capture]:
    """The LM as far as the hookpoints need it, checked, and a capture of them."""
    cfg = ModelConfig(str(folder), hookpoints=tuple(map(literal, hookpoints)))
    skeleton, found = find_hookpoints(cfg)
    lm = load_lm(cfg, skeleton, found)
    return lm, checked(Capture(lm, found), 16)


def literal(name: str) -> str:
    """A glob for one name."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def seen_by_hooks(lm: PreTrainedModel) -> dict[str, list[tuple[Tensor | None, Tensor | None]]]:
    """What entered and left every module, call by call, by plain hooks on a whole forward."""
    seen: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {}
    handles = []
    for name, module in lm.base_model.named_modules():

        def hook(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            pair = (first_tensor((args, kwargs)), first_tensor(output))
            seen.setdefault(name, []).append(tuple(None if t is None else t.clone() for t in pair))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        lm.base_model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return seen


def rows_of(tensor: Tensor) -> Tensor | None:
    """Rows of tokens, [B S] in that order, where its sizes say that it has some."""
    (b, s), sizes = TOKENS.shape, [n for n in tensor.shape[:-1] if n != 1]
    if sizes == [s, b]:
        return tensor.transpose(0, 1).reshape(b * s, -1)
    return tensor.reshape(b * s, -1) if sizes in ([b, s], [b * s]) else None


def compare_modules(model_type: str, folder: Path) -> Counter[str]:
    """Every module alone: how many give the rows of the whole LM, and how many are refused.

    Fails for one that gives other rows.
    """
    lm = freeze(build(model_type))
    lm.save_pretrained(folder)
    whole, found = seen_by_hooks(lm), Counter[str]()
    loaded: dict[Any, PreTrainedModel] = {}
    for name in [name for name, _ in lm.base_model.named_modules() if name]:
        cfg = ModelConfig(str(folder), hookpoints=(literal(name),))
        try:
            skeleton, hookpoints = find_hookpoints(cfg)
            kept = getattr(skeleton.base_model, "kept_layers", None)
            if kept not in loaded:
                loaded[kept] = load_lm(cfg, skeleton, hookpoints)
            x, y = checked(Capture(loaded[kept], hookpoints), 16)(TOKENS)[name]
        except UsageError as error:
            assert name in str(error) or "cannot read text" in str(error), error
            found["refused"] += 1
            continue
        assert len(whole.get(name, ())) == 1, f"{model_type} {name}: {len(whole.get(name, ()))}"
        for got, tensor in zip((x, y), whole[name][0], strict=True):
            if got.shape[1] == 0:
                continue  # takes token ids
            assert tensor is not None
            expected = rows_of(tensor)
            assert expected is not None, f"{model_type} {name}: {tuple(tensor.shape)}"
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5), f"{model_type} {name}"
        found["same"] += 1
    return found


@pytest.mark.parametrize("model_type", SOME)
def test_residual_streams_of_a_cut_lm_are_those_of_the_whole(
    model_type: str, tmp_path: Path
) -> None:
    """At every layer the cut LM gives the whole one's rows, from fewer weights, one config."""
    lm = freeze(build(model_type))
    lm.save_pretrained(tmp_path)
    whole = seen_by_hooks(lm)
    _, layers = find_hookpoints(ModelConfig(str(tmp_path)))
    for layer in layers[:-1]:
        cut, capture = load(tmp_path, layer)
        expected = rows_of(whole[layer][0][1])  # type: ignore[arg-type]  # a block returns rows
        torch.testing.assert_close(capture(TOKENS)[layer][1], expected, rtol=1e-5, atol=1e-6)
        weights = [len(list(one.parameters())) for one in (cut, lm)]
        assert weights[0] < weights[1] or model_type in LOADED_WHOLE
        assert cut.config.num_hidden_layers == lm.config.num_hidden_layers


@pytest.mark.parametrize("model_type", ["minicpm3", "openai-gpt"])
def test_every_module_gives_the_rows_of_the_whole_lm_or_is_refused(
    model_type: str, tmp_path: Path
) -> None:
    """No module gives other rows without a word."""
    found = compare_modules(model_type, tmp_path)
    assert found["same"] > 20


@pytest.mark.architectures
@pytest.mark.parametrize("model_type", names())
def test_every_module_of_every_architecture(model_type: str, tmp_path: Path, figure: Any) -> None:
    """The same, for all that transformers can build small."""
    try:
        build(model_type)
    except Exception as error:  # whatever it asks for
        pytest.skip(f"no small one: {' '.join(str(error).split())[:80]}")
    found = compare_modules(model_type, tmp_path)
    figure(model_type, f"{found['same']} modules as in the whole LM, {found['refused']} refused")


def test_what_runs_after_the_layers_needs_them_all(tmp_path: Path) -> None:
    """OPT declares its last norm before its layers: order is that of execution."""
    lm = freeze(build("opt"))
    lm.save_pretrained(tmp_path)
    expected = rows_of(seen_by_hooks(lm)["decoder.final_layer_norm"][0][1])  # type: ignore[arg-type]
    _, capture = load(tmp_path, "decoder.final_layer_norm")
    torch.testing.assert_close(capture(TOKENS)["decoder.final_layer_norm"][1], expected)


@pytest.mark.parametrize("others", [(), ("h.2",)])
def test_a_module_that_runs_several_times_is_refused(
    others: tuple[str, ...], tmp_path: Path
) -> None:
    """GPT-1's blocks share one activation: it is named with its calls, whatever else is asked."""
    freeze(build("openai-gpt")).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"hookpoint h\.0\.mlp\.act runs 4 times"):
        load(tmp_path, "h.0.mlp.act", *others)


def test_positions_before_sequences_are_brought_into_order(tmp_path: Path) -> None:
    """XLNet's blocks give [S B D]: rows come by sequence, and excluded tokens drop their own."""
    lm = freeze(build("xlnet"))
    lm.save_pretrained(tmp_path)
    with torch.no_grad():  # [B S D], as the model itself returns it
        expected = lm(input_ids=TOKENS, output_hidden_states=True).hidden_states[2]
    cut, capture = load(tmp_path, "layer.1")
    torch.testing.assert_close(capture(TOKENS)["layer.1"][1], expected.reshape(16, -1))
    unwanted = int(TOKENS[0, 3])
    without = Capture(cut, ["layer.1"], replace(capture.rule, exclude_tokens=(unwanted,)))
    kept = (unwanted != TOKENS).flatten()
    torch.testing.assert_close(without(TOKENS)["layer.1"][1], expected.reshape(16, -1)[kept])


def test_a_length_that_the_lm_cannot_read_is_one_line() -> None:
    """RoBERTa has two positions fewer than it says."""
    config = hf.RobertaConfig(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 48, "max_position_embeddings": 18, "pad_token_id": 1},
    )
    lm = freeze(AutoModel.from_config(config))
    capture = Capture(lm, ["encoder.layer.1"])
    assert checked(capture, 16).rule.sequence_first == frozenset()
    with pytest.raises(UsageError, match="--ctx_len 18: RobertaModel fails on sequences of that"):
        checked(capture, 18)


def test_an_lm_whose_padding_is_token_0_is_tried_with_others(tmp_path: Path) -> None:
    """mBART looks for the end behind which padding begins, and fails where all is padding."""
    lm = freeze(build("mbart"))
    lm.save_pretrained(tmp_path)
    whole = seen_by_hooks(lm)
    for name in ("encoder.layers.1", "decoder.layers.2.fc1"):
        _, capture = load(tmp_path, name)
        expected = rows_of(whole[name][0][1])  # type: ignore[arg-type]  # both return rows
        torch.testing.assert_close(capture(TOKENS)[name][1], expected)
