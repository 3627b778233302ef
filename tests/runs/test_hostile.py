"""Files, data and flags that mean harm or make no sense: refused in one line, or harmless."""

import json
import pickle
import signal
import string
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import tyro
from conftest import tiny_lm
from hypothesis import HealthCheck, given, settings, strategies
from safetensors.torch import load_file, save_file
from starts import PATIENCE, Starter, folder, starter
from torch import Tensor
from training_runs import Settings, run
from transformers import AutoTokenizer, PreTrainedModel

from sae import DataConfig, ModelConfig, SaeConfig, SparseCoder, UsageError, load_many
from sae.data.text import load_tokens
from sae.flag_checks import from_flags
from sae.judge.evaluate import EvaluateConfig, evaluate
from sae.runs.dry_run import show_plan
from train_sae import TrainConfig

ROOT = Path(__file__).parents[2]
DEMO = ModelConfig(str(ROOT / "demo/lm"))
__all__ = ["folder", "starter"]  # fixtures
Figure = Callable[[str, str], None]


class Planted:
    """Leaves a trace when a pickle of it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def coder(tmp_path: Path) -> Path:
    path = tmp_path / "coders" / "layers.1"
    SparseCoder(8, SaeConfig(num_latents=16, k=2)).save_to_disk(path)
    return path


CONFIGS: list[Any] = [
    *("", "nonsense", "[]", "null", "[" * 100_000, '{"d_in": 8', "\ud83d", "1" * 5000),
    *({"d_in": "8"}, {"d_in": 8.0}, {"d_in": True}, {"d_in": None}, {"d_in": -8}, {"d_in": 2**70}),
    *({"k": "2"}, {"k": 0}, {"k": -1}, {"k": 10**30}, {"k": 17}, {"k": None}, {"k": 1.5}),
    *({"num_latents": 2**60}, {"num_latents": -16}, {"num_latents": 17}, {"num_latents": [16]}),
    *({"expansion_factor": 2**39, "num_latents": 0}, {"activation": "relu"}, {"activation": 5}),
    *({"transcode": "yes"}, {"multi_topk": 1}, {"skip_connection": True}, {"signed": True}),
    *({"__reduce__": "x"}, {"normalize_decoder": "../../x"}),
]


@pytest.mark.parametrize("change", CONFIGS, ids=range(len(CONFIGS)))
def test_hostile_configs_are_refused(coder: Path, change: Any) -> None:
    """Wrong types, huge numbers, unknown keys: one readable error, and no giant allocation."""
    file = coder / "cfg.json"
    if isinstance(change, str):
        file.write_bytes(change.encode("utf-8", "surrogatepass"))
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UsageError, match=r"cfg\.json|--|sae\.safetensors"):
        SparseCoder.load_from_disk(coder)


def test_hostile_tensors_are_refused(coder: Path, figure: Figure) -> None:
    """Wrong shapes and types, headers that promise too much, pickles: refused, and no code runs."""
    file = coder / "sae.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    trace = coder / "trace"
    header = json.dumps(
        {"b_dec": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    planted = pickle.dumps(Planted(trace))
    for content in (
        b"",
        whole[:100],
        struct.pack("<Q", 2**60) + whole[8:],
        struct.pack("<Q", len(header)) + header,
        planted,
        whole[:8] + planted + whole[8:],
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="sae.safetensors"):
            SparseCoder.load_from_disk(coder)
    for change in (
        {"b_dec": torch.zeros(9)},
        {"encoder.bias": torch.zeros(16, dtype=torch.int64)},
        {"extra": torch.zeros(1)},
        {"W_dec": torch.zeros(16, 8, 1)},
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises(UsageError, match="sae.safetensors"):
            SparseCoder.load_from_disk(coder)
    file.unlink()
    for name in ("sae.pt", "sae.bin", "pytorch_model.bin"):
        (coder / name).write_bytes(planted)
    with pytest.raises(UsageError):
        SparseCoder.load_from_disk(coder)
    assert not trace.exists()
    figure(
        "hostile coder files", f"{len(CONFIGS)} configs and 13 tensor files refused, no code run"
    )


@pytest.mark.parametrize("name", ["../x", "/etc", "layers.0/../../x", ".."])
def test_names_do_not_lead_out_of_the_folder(coder: Path, name: str) -> None:
    """Hookpoints with .. or an absolute path are refused before anything is read."""
    with pytest.raises(UsageError, match="hookpoint|run_name"):
        load_many(coder.parent, layers=[name])
    with pytest.raises(UsageError, match="hookpoint"):
        SparseCoder.load_from_hub("someone/coders", hookpoint=name)
    with pytest.raises(UsageError, match="run_name"):
        from_flags(TrainConfig, {"run_name": name})


def test_a_language_model_in_a_pickle_is_refused(tmp_path: Path) -> None:
    """Weights of a model that are a pickle are not loaded."""
    trace = tmp_path / "trace"
    tiny_lm().save_pretrained(tmp_path / "lm")
    (tmp_path / "lm/model.safetensors").unlink()
    (tmp_path / "lm/pytorch_model.bin").write_bytes(pickle.dumps(Planted(trace)))
    torch.zeros(64 * 64, dtype=torch.int16).numpy().tofile(tmp_path / "ids.bin")
    cfg = EvaluateConfig(str(tmp_path), model=str(tmp_path / "lm"), dataset=str(tmp_path / "i.bin"))
    SparseCoder(32, SaeConfig(num_latents=64, k=2)).save_to_disk(tmp_path / "layers.1")
    with pytest.raises(UsageError, match="cannot be loaded|no such language model"):
        evaluate(cfg)
    assert not trace.exists()


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    """A model whose config names code of its own is refused without a question."""
    tiny_lm().save_pretrained(tmp_path / "lm")
    config = json.loads((tmp_path / "lm/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "lm/config.json").write_text(json.dumps(config))
    trace = tmp_path / "trace"
    (tmp_path / "lm/mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: ...\n")
    with pytest.raises(UsageError, match="MODEL .*"):
        show_plan(from_flags(TrainConfig, {"model": str(tmp_path / "lm"), "dataset": "x"}))
    assert not trace.exists()


def test_hostile_run_files_are_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A run.json or manifest.json of other types is one readable error."""
    run(lm, tokens, settings, run_name="r", layers=(1,))
    folder = Path(settings["save_dir"]) / "r"
    for content in ("[]", "{}", '{"model": 5}', '{"model": "m", "dataset": ["x"]}', "\x00"):
        (folder / "run.json").write_text(content)
        with pytest.raises(UsageError):
            run(lm, tokens, settings, run_name="r", layers=(1,), resume=True)
        with pytest.raises(UsageError):
            evaluate(EvaluateConfig(str(folder)))


@pytest.mark.faults
def test_a_document_of_ten_megabytes_is_packed_whole(tmp_path: Path) -> None:
    """Every token of it is there, between its neighbours' end tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/lm")
    texts = ["def f(): pass", "x = 1\n" * (10 * 2**20 // 6), "", "def f(): pass"]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = load_tokens(DataConfig(str(file), ctx_len=64), DEMO, limits=(4096, None))
    batches = source.batches(torch.arange(len(source)), 512)
    ids = torch.cat([batch.ids for batch in batches]).flatten().tolist()
    expected = []
    for text in filter(None, texts):
        expected += [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]
    assert len(ids) == len(expected) // 64 * 64 and ids == expected[: len(ids)]


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, name: str) -> None:
    """A file that is not UTF-8 is one readable error."""
    (tmp_path / name).write_bytes(b'{"text": "caf\xe9 \xff\xfe"}\n' * 50)
    with pytest.raises(UsageError, match="cannot be read|is not UTF-8"):
        load_tokens(DataConfig(str(tmp_path / name), ctx_len=8), DEMO, limits=(4096, None))


def test_a_stream_that_ends_within_a_step_ends_all_ranks(starter: Starter, figure: Figure) -> None:
    """Text that gives out in the middle of a step ends all ranks with the reason, and no hang."""
    words = " ".join(f"w{i}" for i in range(700))
    texts = ["", "\u0000", "\u202etxet\U0001f600", words, words]
    file = starter.folder / "few.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    argv = ["--streaming", "--max_examples", "400", "--ctx_len", "64", "--k", "4"]
    ranks = starter.start_on(str(ROOT / "demo/lm"), str(file), "stream", *argv, world=2)
    codes = [starter.wait(pid) for pid in ranks]
    said = starter.log("stream") + starter.log("stream", 1)
    assert codes == [2, 2] and "the data set ended before sequence" in said, (codes, said)
    figure("text that ends within a step, 2 ranks", "both end with code 2 and the reason")


INTEGERS = [0, 1, 1, 2, 3, 8, 64, 512, -1, 2**31, 2**40, 2**63, 10**30, -(2**63)]
FLOATS = ["0", "0.03125", "1", "1e-300", "1e400", "-0.0", "nan", "inf", "-inf", "1e308"]
TEXTS = ["", ".", "..", "/", "layers.1", "layers.*", "*", "[", "layers.1=0", "\u202e\U0001f600"]
TEXTS += ["a=b,c", "x" * 5000, "0", "True", "None"]


def words_of(kind: Any) -> Any:
    """What may follow a flag of that type: words of the right kind, at the edges of it."""
    options = [option for option in get_args(kind) if option is not type(None)]
    if get_origin(kind) is Literal:
        return strategies.sampled_from(options).map(lambda value: [str(value)])
    if get_origin(kind) is tuple:
        return strategies.lists(words_of(options[0]).map(lambda w: w[0]), min_size=1, max_size=3)
    if options:
        return words_of(options[0])
    if kind is bool:
        return strategies.just([])
    if kind is int:
        return strategies.sampled_from(INTEGERS).map(lambda value: [str(value)])
    words = strategies.sampled_from(FLOATS if kind is float else TEXTS)
    return strategies.one_of(words, strategies.text(string.printable, max_size=9)).map(
        lambda w: [w]
    )


def arguments() -> Any:
    """Command lines of the script: mostly its own flags, mostly with words of the right kind."""
    groups = [type(f.default) for f in fields(TrainConfig)]
    hints = {name: kind for group in groups for name, kind in get_type_hints(group).items()}
    names = [name for name in hints if name not in ("model", "dataset", "hf_token")]
    fitting = strategies.sampled_from(names).flatmap(
        lambda name: words_of(hints[name]).map(lambda words: [f"--{name}", *words])
    )
    words = strategies.sampled_from([*TEXTS, *FLOATS, *map(str, INTEGERS)])
    strange = strategies.tuples(strategies.sampled_from(names), words)
    any_flag = strategies.one_of(
        fitting, fitting, fitting, fitting, strange.map(lambda pair: [f"--{pair[0]}", pair[1]])
    )
    return strategies.lists(any_flag, max_size=4).map(
        lambda found: [word for words in found for word in words]
    )


@contextmanager
def no_hang(what: list[str]) -> Iterator[None]:
    """Fail if what is done inside does not end at all."""

    def fail(*_: Any) -> None:
        raise AssertionError(f"{what} takes more than {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("cases", [120, pytest.param(2000, marks=pytest.mark.faults)])
def test_any_flags_give_a_run_or_one_error(
    cases: int, folder: Path, figure: Figure, capsys: pytest.CaptureFixture
) -> None:
    """Whatever the arguments, the dry run is shown or one readable error, and nothing hangs."""
    ends = {"shown": 0, "refused": 0, "not parsed": 0}

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(arguments())
    def law(line: list[str]) -> None:
        args = [str(folder / "lm"), "data", *line]
        flat = (tyro.conf.OmitArgPrefixes,)
        try:
            with no_hang(line):
                show_plan(tyro.cli(TrainConfig, args=args, use_underscores=True, config=flat))
            ends["shown"] += 1
        except UsageError as error:
            assert len(str(error)) < 7000 and "\n" not in str(error).strip()
            ends["refused"] += 1
        except SystemExit:  # the parser's own: what it printed names the flag
            ends["not parsed"] += 1
        capsys.readouterr()

    law()
    assert min(ends.values()) > cases // 10
    said = ", ".join(f"{end}: {count}" for end, count in ends.items())
    figure("flags at random", f"{sum(ends.values())} cases: {said}, no traceback")
