"""What a user gets wrong ends in one line on standard error, the right exit code, and no trace of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

from cloq_export.artifact.run_directory import RunDirectory
from cloq_export.cli import main
from cloq_export.files.safe_tensors import read_safetensors
from cloq_export.files.tensor_writer import write_safetensors
from cloq_export.recipe import Recipe

FAILED, MISUSE = 1, 2

Edit = Callable[[Path], None]


@pytest.fixture
def refused(
    tmp_path: Path, texts: dict[str, str], model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs `cloq run` with wrong input and returns the one line that it prints."""

    small = {"group_size": 32, "rank": 4, "samples": 4, "seqlen": 32, "precision": "float32", "eval_window": 16}

    def run(*options: str, model: str | Path | None = None, code: int = FAILED, **more: Any) -> str:
        out = more.get("out", tmp_path / "run")
        settings = {
            name: value for name, value in {**texts, **small}.items() if f"--{name.replace('_', '-')}" not in options
        }
        settings |= {name: more[name] for name in ("calibration", "eval_text", "eval_window") if name in more}
        arguments = ["run", str(model or model_folder("llama")), "--out", str(out), "--json", *options]
        arguments += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        capsys.readouterr()
        assert main(arguments) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        lines = [line for line in printed.err.splitlines() if line.strip()]
        if not more.get("after_progress"):
            assert len(lines) == 1, printed.err
        assert lines[-1].startswith("error: ")
        assert lines[-1].endswith(".")
        if "out" not in more:
            assert not out.exists(), "something is left that looks like a run"
        return lines[-1].removeprefix("error: ")

    return run


@pytest.fixture
def broken(tmp_path: Path, model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function to a copy of a model that an edit has spoilt."""

    def spoil(edit: Edit, family: str = "llama") -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder(family), folder)
        edit(folder)
        return folder

    return spoil


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(folder: Path) -> None:
        tensors, metadata = read_safetensors(folder / "model.safetensors")
        tensors[name] = change(tensors[name].clone())
        write_safetensors(folder / "model.safetensors", tensors, metadata)

    return edit


def change_config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def put(name: str, content: bytes | None) -> Edit:
    def edit(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return edit


def cut(name: str, kept: int) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:kept])

    return edit


def spoil_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return change


UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change_tensor(UP_PROJ, spoil_element(float("nan"))),
            f"the weight {UP_PROJ} holds 1 NaN or Inf values of 6144",
        ),
        (
            change_tensor("model.embed_tokens.weight", spoil_element(float("-inf"))),
            "the weight model.embed_tokens.weight holds 1 NaN or Inf values",
        ),
        (cut("model.safetensors", 20_000), "is damaged: "),
        (cut("model.safetensors", 5), "is damaged: "),
        (put("model.safetensors", b"\xff" * 4096), "is damaged: "),
        (put("model.safetensors", b""), "is damaged: "),
        (put("model.safetensors", None), "has no weights: neither model.safetensors nor"),
        (put("config.json", None), "has no config.json, so it is not a model folder"),
        (put("config.json", b"{"), "is damaged: "),
        (change_config(model_type="sorcery"), "is no causal language model that the installed transformers knows"),
        (change_config(num_hidden_layers=3), "lacks 9 weights of LlamaForCausalLM"),
        (change_config(quantization_config={"quant_method": "awq"}), "is already quantized (method awq)"),
        (put("tokenizer.json", b"[]"), "the tokenizer of "),
    ],
)
def test_a_damaged_model(edit: Edit, message: str, refused: Callable[..., str], broken: Callable[..., Path]) -> None:
    assert message in refused(model=broken(edit))


def test_a_model_that_is_not_there(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no model at './nowhere'" in refused(model="./nowhere")
    assert "is not a GGUF file" in refused(model=__file__)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused(model="nobody/nothing-at-all")
    assert "the hub model nobody/nothing-at-all cannot be fetched: " in message
    assert "Connect to the network, or give a local folder or GGUF file" in message


def test_a_run_given_as_a_model(tmp_path: Path, recipe_for: Callable[..., Recipe], refused: Callable[..., str]) -> None:
    RunDirectory.create_or_resume(tmp_path / "earlier", recipe_for().to_mapping(), "sha256:0", {}).close()
    assert "it is a run directory. Give the float model that the run was made from" in refused(
        model=tmp_path / "earlier"
    )


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--group-size", "48"), FAILED, "model.layers.0.self_attn.q_proj: a layer with 64 inputs cannot be cut into "),
        (("--group-size", "33"), MISUSE, "group_size is 33; allowed are -1"),
        (("--rank", "33"), FAILED, "rank 33 is above 32, the smaller side of this 32 x 64 layer; lower it with --rank"),
        (("--rank", "-1"), MISUSE, "rank is -1; it must be at least 0"),
        (("--bits", "5"), MISUSE, "bits is 5; allowed are 2, 3, 4 and 8"),
        (("--override", "*.out_proj:bits=4"), MISUSE, "the override pattern '*.out_proj' matches no linear layer"),
        (("--override", "*:skip"), MISUSE, "every linear layer is skipped"),
        (("--override", "*.up_proj:rank=65"), FAILED, "model.layers.0.mlp.up_proj: rank 65 is above 64"),
        (
            ("--blocks", "model.norm"),
            FAILED,
            "is a LlamaRMSNorm, not a list of blocks; lists with linear layers: model.l",
        ),
        (("--blocks", "transformer.h"), FAILED, "LlamaForCausalLM has no module 'transformer.h'"),
        (("--set", "bitz=3"), MISUSE, "'bitz' is not an option of a recipe (did you mean 'bits'?)"),
        pytest.param(
            ("--device", "cuda"),
            MISUSE,
            "torch sees no CUDA device: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_do_not_fit(
    options: tuple[str, ...], code: int, message: str, refused: Callable[..., str]
) -> None:
    assert message in refused(*options, code=code)


def test_the_corrected_command_is_not_refused(
    tmp_path: Path, refused: Callable[..., str], recipe_for: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    refused("--rank", "33")
    recipe = recipe_for(rank=2)
    arguments = ["run", recipe.model, "--out", str(tmp_path / "run"), "--json"]
    for name in ("calibration", "eval_text", "group_size", "rank", "samples", "seqlen", "eval_window"):
        arguments += ["--set", f"{name}={getattr(recipe, name)}"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a file or data set with text in it"),
        (b" \n\t \n", "is empty; give a file or data set with text in it"),
        (b"w1 w2 w3", "the calibration text has 3 tokens, one window needs 32; give a longer text with --calibration"),
        (b"\xff\xfe\x00", "is not UTF-8 text: the file is UTF-16"),
    ],
)
def test_a_text_that_does_not_do(content: bytes, message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    assert message in refused(calibration=tmp_path / "text.txt")


def test_a_text_too_short_to_measure_on_is_found_before_the_work(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5")
    message = refused(eval_text=tmp_path / "text.txt")
    assert "the evaluation text has 5 tokens, one window needs 16; give a longer text" in message
    assert "eval_window is 1; it must be at least 2" in refused(eval_window=1, code=MISUSE)


def test_a_text_that_is_not_there(tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'./text.txt' is not a readable text file" in refused(calibration="./text.txt")
    monkeypatch.setenv("CLOQ_DATA", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "CLOQ_DATA" in refused(calibration="wikitext2")


def test_windows_beyond_the_models_positions(refused: Callable[..., str], model_folder: Callable[..., Path]) -> None:
    """OPT looks its positions up in a table: longer windows cannot be run at all."""
    message = refused("--seqlen", "80", model=model_folder("opt"), code=MISUSE)
    assert "a calibration window has 80 tokens, but this model reads at most 64; choose --seqlen 64 or less" in message
    message = refused(model=model_folder("opt"), eval_window=65, code=MISUSE)
    assert "an evaluation window has 65 tokens, but this model reads at most 64; choose 64 or less" in message


def test_a_tokenizer_of_another_model(
    refused: Callable[..., str], broken: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    def shrink(folder: Path) -> None:
        change_tensor("model.embed_tokens.weight", lambda tensor: tensor[:50].contiguous())(folder)
        change_config(vocab_size=50)(folder)

    message = refused(model=broken(shrink), after_progress=True)
    assert "tokenizer and model do not belong together" in message


def add_token(folder: Path) -> None:
    """Add a token to a tokenizer and none to the embeddings, as a fine-tune that forgot to resize them leaves it."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": 96, "content": "<new>", "special": True, **flags})
    path.write_text(json.dumps(content))


def test_a_token_without_an_embedding_in_what_is_measured_on_or_learned(
    tmp_path: Path, refused: Callable[..., str], broken: Callable[..., Path], texts: dict[str, str]
) -> None:
    """A run that measures its result last would otherwise fail when the work is done."""
    model = broken(add_token)
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text(f"<new> {Path(texts['eval_text']).read_text()}")
    message = refused(model=model, eval_text=str(text), after_progress=True)
    assert "the evaluation tokens reach id 96, the model's vocabulary has 96 entries" in message
    rows.write_text('{"prompt": "<new>", "completion": "w1"}\n' * 4)
    message = refused(
        *("--set", f"finetune.data={rows}", "--set", "finetune.seqlen=32"), model=model, after_progress=True
    )
    assert "the tokens to learn reach id 96, the model's vocabulary has 96 entries" in message


def test_a_model_that_overflows(tmp_path: Path, refused: Callable[..., str], broken: Callable[..., Path]) -> None:
    edit = change_tensor("model.layers.1.input_layernorm.weight", lambda tensor: tensor * 1e38)
    # The first block is finished by then, so the run stays and says that it is not done.
    out = tmp_path / "kept"
    message = refused(model=broken(edit), after_progress=True, out=out)
    assert (
        "the input of model.layers.1.self_attn.q_proj: the Gram matrix holds NaN or Inf: the model overflows" in message
    )
    run = RunDirectory.open(out)
    assert run.state == "running"
    assert len(run.completed_modules()) == 7
    assert run.adapters.names == []
    assert not run.checkpoint_path.exists()


def test_structures_that_cannot_be_quantized(tmp_path: Path, refused: Callable[..., str]) -> None:
    small: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    fused = transformers.JetMoeConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_key_value_heads=1,
        kv_channels=16,
        num_local_experts=2,
        **small,
    )
    for config, message in (
        (fused, "(JetMoeParallelExperts) holds all experts in one tensor, and they cannot be cut into linear layers: "),
        (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, **small), "transformer.h.0.attn.c_attn is a transfor"),
    ):
        folder = tmp_path / config.model_type
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=transformers.AutoTokenizer.from_pretrained(small_tokenizer(tmp_path)).backend_tokenizer
        )
        tokenizer.save_pretrained(folder)
        assert message in refused(model=folder)


def small_tokenizer(tmp_path: Path) -> Path:
    import tokenizers

    folder = tmp_path / "tokenizer"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "w1": 3}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_a_folder_that_holds_something_else(
    tmp_path: Path, refused: Callable[..., str], contents: Callable[[Path], dict[str, str]]
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    before = contents(folder)
    assert "holds chapter.tex but no run.json, so it is not a run; choose an empty or new folder" in refused(out=folder)
    assert contents(folder) == before
    assert "is a file; choose a folder with --out" in refused(out=folder / "chapter.tex")
    assert "cannot be written: Not a directory" in refused(out=folder / "chapter.tex" / "run")
    assert contents(folder) == before
    (folder / "chapter.tex").rename(folder / "run.json")
    assert "run.json" in refused(out=folder)
    assert (folder / "run.json").read_text() == "years of work"


def test_an_empty_folder_is_welcome_and_stays_free_after_a_mistake(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    refused("--rank", "33", out=folder)
    assert not folder.exists()
