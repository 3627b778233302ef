"""Which flags do not go with coders over several hookpoints."""

from typing import Any

from ...flag_checks import refuse


def check_flags(cfg: Any) -> None:
    """Raise UsageError for flags of the script's `TrainConfig` that exclude each other."""
    if cfg.coder.crosscoder:
        _check_crosscoder(cfg)
    elif cfg.model.models:
        refuse(cfg.model, "models", "are for a crosscoder over several LMs: add --crosscoder")
    if cfg.coder.cross_layer:
        _check_cross_layer(cfg)


def _check_crosscoder(cfg: Any) -> None:
    coder, training = cfg.coder, cfg.training
    name = "--crosscoder"
    if coder.transcode:
        refuse(coder, "transcode", f"{name} reconstructs what it reads: drop one of the two")
    if coder.skip_connection:
        refuse(coder, "skip_connection", f"{name} reconstructs what it reads: drop it")
    if not coder.normalize_decoder:
        refuse(coder, "normalize_decoder", f"{name} selects latents by decoder norms: drop it")
    if training.uses_lm_loss:
        refuse(training, "loss_fn", f"{name} needs all hookpoints before it can replace one: fvu")
    if cfg.model.exclude_norm is not None:
        why = f"{name} needs the same rows at every hookpoint: use --exclude_positions"
        refuse(cfg.model, "exclude_norm", why)
    if cfg.machine.owning:
        why = f"{name} is one coder, of which all ranks train replicas: drop it"
        refuse(cfg.machine, cfg.machine.owning, why)


def _check_cross_layer(cfg: Any) -> None:
    coder, training = cfg.coder, cfg.training
    name = f"--cross_layer {coder.cross_layer}"
    if not coder.transcode:
        refuse(coder, "transcode", f"{name} is for transcoders: add --transcode")
    if coder.multi_topk:
        refuse(coder, "multi_topk", f"{name} would need 4k latents of every layer: drop it")
    if coder.matryoshka:
        refuse(coder, "matryoshka", f"{name} has no prefixes: drop one of the two")
    if training.uses_lm_loss:
        refuse(training, "loss_fn", f"{name} is trained on the FVU of every layer: use fvu")
    if cfg.model.exclude_norm is not None:
        why = f"{name} needs the same rows at every hookpoint: use --exclude_positions"
        refuse(cfg.model, "exclude_norm", why)
    if not training.rms_units:
        refuse(training, "rms_units", f"{name} weighs its layers in that unit: leave it out")
    if cfg.machine.sharing:
        why = f"{name} has a coder of each layer, which one rank has whole: leave it out"
        refuse(cfg.machine, cfg.machine.sharing, why)
