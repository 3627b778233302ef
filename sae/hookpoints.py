"""Places in the LM: find them by glob, load no more than they need, capture what flows there."""

import difflib
import re
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int
from natsort import natsorted
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from .config import UsageError
from .linear import fast_linear_layers


@dataclass(frozen=True)
class Hookpoint:
    """A module of the base model and the widths of what enters and leaves it."""

    name: str
    d_in: int
    d_out: int


class _LastHookpoint(Exception):
    """Raised by a hook when everything asked for is captured: the rest of the LM need not run."""


def find_hookpoints(
    model: str | PreTrainedModel,
    patterns: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    layer_stride: int = 1,
    *,
    with_head: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """The LM without its weights, from its config alone, and the chosen hookpoints.

    The LM keeps no more layers than the hookpoints need, and its head only `with_head`, which
    keeps all layers. An LM that is loaded already is returned, frozen. Raises UsageError for an
    unknown model, one without the head, or a hookpoint that matches nothing.
    """
    if not isinstance(model, str):
        if with_head and model.get_output_embeddings() is None:
            raise UsageError(
                f"--loss_fn, --eval_every: {type(model).__name__} has no head; load it by "
                f"AutoModelForCausalLM"
            )
        return freeze(model), choose_hookpoints(model, patterns, layers, layer_stride)
    auto = AutoModelForCausalLM if with_head else AutoModel
    try:
        config = AutoConfig.from_pretrained(
            model, revision=revision, token=token, trust_remote_code=False
        )
        with torch.device("meta"):
            skeleton = auto.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # a config's checks raise errors of many kinds
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"MODEL {model}: no such language model here or on the Hub; give a folder with "
            f"config.json and safetensors, or a Hub id (and --hf_token if it is gated). {reason}"
        ) from None
    names = choose_hookpoints(skeleton, patterns, layers, layer_stride)
    needed = None if with_head else layers_needed(skeleton, names)
    if needed is not None:
        layers_left_out: Any = skeleton.base_model.get_submodule(text_layers(skeleton)[0])
        del layers_left_out[needed:]
        _text_config(config).num_hidden_layers = needed
    return freeze(skeleton), names


def load_lm(
    name: str,
    skeleton: PreTrainedModel,
    hookpoints: list[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    load_in_8bit: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> PreTrainedModel:
    """The frozen LM with its weights, as far as `find_hookpoints` left its config.

    Under ZeRO-3 it is read straight into shards. Raises UsageError for weights that cannot be read,
    that the hookpoints depend on but the files lack, or that are not of the wanted dtype.
    """
    quantized = BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None
    verbosity = transformers_logging.get_verbosity()
    # Weights of layers left out are reported as unexpected; missing ones are checked below.
    transformers_logging.set_verbosity_error()
    try:
        auto: Any = AutoModel if skeleton.base_model is skeleton else AutoModelForCausalLM
        lm, report = auto.from_pretrained(
            name,
            config=skeleton.config,
            dtype=torch.float16 if load_in_8bit else dtype,
            revision=revision,
            token=token,
            quantization_config=quantized,
            device_map={"": device} if load_in_8bit else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ImportError as error:
        raise UsageError(f"--load_in_8bit: {' '.join(str(error).split())}") from None
    except Exception as error:  # a damaged file surfaces as any of several libraries' own errors
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL {name}: its weights cannot be loaded. {reason}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = _weights_in_use(skeleton, hookpoints, set(report["missing_keys"]))
    if missing:
        raise UsageError(
            f"MODEL {name}: its files lack {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}; training on random weights is refused"
        )
    if is_sharded(lm) and lm.dtype != dtype:  # DeepSpeed's own setting decides, and says nothing
        raise UsageError(f"MODEL {name}: DeepSpeed loaded it in {lm.dtype} instead of {dtype}")
    return freeze(lm if load_in_8bit or is_sharded(lm) else lm.to(device))


def is_sharded(lm: PreTrainedModel) -> bool:
    """Whether every rank holds a part of every weight (ZeRO-3)."""
    return hasattr(next(lm.parameters()), "ds_id")


def token_limits(lm: PreTrainedModel) -> tuple[int, int | None]:
    """Number of token ids in the LM's embedding, and of its positions where it has a limit."""
    embedding: Any = lm.get_input_embeddings()  # sharded, its weight shows no shape
    positions = getattr(_text_config(lm.config), "max_position_embeddings", None)
    return embedding.num_embeddings, positions if isinstance(positions, int) else None


def freeze(lm: PreTrainedModel) -> PreTrainedModel:
    """Put the LM in eval mode, without gradients and without a key-value cache."""
    lm.eval().requires_grad_(False)
    if hasattr(lm.config, "use_cache"):
        lm.config.use_cache = False
    return lm


def choose_hookpoints(
    lm: PreTrainedModel,
    patterns: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    layer_stride: int = 1,
) -> list[str]:
    """Module names of the base model that match the globs, in natural order.

    Without globs: the residual stream after every layer in `layers`, or after every
    `layer_stride`-th one.
    """
    names = [name for name, _ in lm.base_model.named_modules() if name]
    if patterns:
        chosen: set[str] = set()
        for pattern in patterns:
            found = [name for name in names if fnmatchcase(name, pattern)]
            if not found:
                near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
                raise UsageError(
                    f"--hookpoints {pattern}: no module of {type(lm).__name__} has such a name; "
                    f"the nearest are {', '.join(natsorted(near))}"
                )
            chosen.update(found)
        return natsorted(chosen)
    prefix, depth = text_layers(lm)
    for layer in layers:
        if not 0 <= layer < depth:
            raise UsageError(
                f"--layers {layer}: {type(lm).__name__} has {depth} layers, 0 to {depth - 1}"
            )
    return [f"{prefix}.{i}" for i in sorted(set(layers)) or range(0, depth, layer_stride)]


def text_layers(lm: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of transformer blocks that text goes through."""
    depth = _text_config(lm.config).num_hidden_layers
    lists = [
        name
        for name, module in lm.base_model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        # A multimodal model's other towers can be just as deep.
        and not re.search(r"vision|visual|audio|image|speech", name)
        # Lists inside a block (a mixture's experts) can be just as long.
        and not re.search(r"\.\d+\.", name)
    ]
    if not lists:
        raise UsageError(
            f"{type(lm).__name__} has no list of {depth} layers: name the modules by --hookpoints"
        )
    return lists[0], depth


def layers_needed(lm: PreTrainedModel, hookpoints: Iterable[str]) -> int | None:
    """How many leading layers the hookpoints depend on; None for all of them."""
    try:
        prefix, depth = text_layers(lm)
    except UsageError:
        return None
    order = [name for name, _ in lm.base_model.named_modules()]
    needed = 1
    for name in hookpoints:
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)(\.|$)", name)
        if inside:
            needed = max(needed, int(inside[1]) + 1)
        # Modules declared before the layers (embeddings) run before them.
        elif order.index(name) >= order.index(prefix) or prefix.startswith(f"{name}."):
            return None
    return None if needed == depth else needed


def compile_blocks(lm: PreTrainedModel, hookpoints: Iterable[str]) -> None:
    """Compile the LM's blocks by torch.compile, all but those with a hookpoint inside.

    Hooks on a block run outside of what is compiled; those within would be compiled away.
    """
    prefix, depth = text_layers(lm)
    for i in range(depth):
        name = f"{prefix}.{i}"
        if not any(place.startswith(f"{name}.") for place in hookpoints):
            block = lm.base_model.get_submodule(name)
            block.forward = torch.compile(block.forward)


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _weights_in_use(lm: PreTrainedModel, hookpoints: list[str], missing: set[str]) -> list[str]:
    """Those of the missing weights that a forward up to the last hookpoint, or the head, reads."""
    if not missing or lm.base_model is not lm:
        return sorted(missing)
    used: set[str] = set()
    with ExitStack() as hooks:
        for name, module in lm.named_modules():
            handle = module.register_forward_pre_hook(lambda *_, name=name: used.add(name))
            hooks.callback(handle.remove)
        measure(lm, hookpoints)
    return sorted(key for key in missing if key.rpartition(".")[0] in used)


def measure(
    lm: PreTrainedModel, names: Iterable[str], device: str | torch.device | None = None
) -> list[Hookpoint]:
    """The widths at each hookpoint, by one forward of eight tokens.

    An LM without weights is run on shapes alone.
    """
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=device or lm.device)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else nullcontext():
            captured = capture(lm, tokens, list(names))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL: {type(lm).__name__} cannot read text. {reason}") from None
    return [Hookpoint(name, x.shape[-1], y.shape[-1]) for name, (x, y) in captured.items()]


def capture(
    lm: PreTrainedModel,
    tokens: Int[Tensor, "B S"],
    hookpoints: list[str],
    exclude_tokens: tuple[int, ...] = (),
    *,
    inputs: bool = True,
) -> dict[str, tuple[Float[Tensor, "N D"], Float[Tensor, "N D_out"]]]:
    """One forward of the LM; the (input, output) rows of every hookpoint, one row per token kept.

    Without `inputs` both of a pair are the output. Rows of tokens in `exclude_tokens` are left out.
    Hooks copy what they see, since some LMs go on to write into it; they change nothing. The
    forward stops once the last hookpoint has run, unless the LM is sharded. Raises UsageError for a
    hookpoint that does not run on text or does not give one row per token.
    """
    modules = dict(lm.base_model.named_modules())
    keep = ~torch.isin(tokens, tokens.new_tensor(exclude_tokens)) if exclude_tokens else None
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sharded = is_sharded(lm)

    def store(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        y = first_tensor(output)
        if y is None:
            raise UsageError(f"hookpoint {name}: {type(modules[name]).__name__} returns no tensor")
        out = into = _rows(name, y, tokens, keep)
        if inputs:
            x = first_tensor((args, kwargs))  # an embedding takes token ids: no activations
            into = _rows(name, y[..., :0] if x is None else x, tokens, keep)
        seen[name] = (into, out)
        # A forward cut short would leave shards gathered.
        if len(seen) == len(hookpoints) and not sharded:
            raise _LastHookpoint

    stops = suppress(_LastHookpoint)
    with _hooks(modules, hookpoints, store), torch.no_grad(), stops, fast_linear_layers():
        lm.base_model(input_ids=tokens)
    if absent := [name for name in hookpoints if name not in seen]:
        raise UsageError(
            f"hookpoint {absent[0]} does not run when {type(lm).__name__} reads text: "
            f"take it out of --hookpoints"
        )
    return {name: seen[name] for name in hookpoints}


@contextmanager
def _hooks(modules: dict[str, nn.Module], names: list[str], store: Any) -> Any:
    """Inside, `store(name, args, kwargs, output)` is called after each named module."""
    with ExitStack() as stack:
        for name in names:

            def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                store(name, args, kwargs, output)

            handle = modules[name].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in a module's arguments or outputs."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


def _rows(name: str, tensor: Tensor, tokens: Tensor, keep: Tensor | None) -> Tensor:
    if tensor.ndim < 2 or tensor.shape[:-1].numel() != tokens.numel():
        raise UsageError(
            f"hookpoint {name} passes a tensor of shape {tuple(tensor.shape)}, which is not one "
            f"row per token ({tuple(tokens.shape)}): take it out of --hookpoints"
        )
    rows = tensor.detach().reshape(tokens.numel(), tensor.shape[-1])
    return rows.clone() if keep is None else rows[keep.flatten()]
