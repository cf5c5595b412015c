"""The card of an export: a header that the hub reads, only measured figures, and texts that stay where they belong."""

from __future__ import annotations

import dataclasses
import os

import pytest
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt

from cloq_export.artifact.base_license import License, base_license
from cloq_export.artifact.model_card import (
    CardAdapter,
    CardFacts,
    EngineLines,
    Figure,
    MadeFrom,
    model_card,
    write_model_card,
)
from cloq_export.errors import FormatError

FINGERPRINT = "sha256:" + "ab" * 32


FIGURE = Figure(
    "perplexity", 44.871234, "WikiText-2 test split, 16 x 512 tokens", "2 bits with its adapter", standard_error=0.51234
)
MADE_FROM = MadeFrom("org/Base-1B", "MagR + OPTQ, CLoQ adapter", 64, License("apache-2.0"), (FIGURE,))
FACTS = CardFacts(
    made_from=MADE_FROM,
    layout="gptq_v2",
    base_fingerprint=FINGERPRINT,
    bits=(2,),
    group_size=64,
    symmetric=False,
    adapters=(CardAdapter("cloq", {"rank": 64, "dtype": "float16"}),),
    engines=(
        EngineLines("transformers", "model = cloq_export.load('x')\n", "5.19"),
        EngineLines("vLLM", "vllm serve x", "0.32", "On a GPU.", "bash"),
    ),
    certificate={"file": "cloq_certificate.json", "modules": 210, "verified": True},
    notes=("Calibrated on 128 windows.",),
)


def facts(**changes):
    of_model = {field.name for field in dataclasses.fields(MadeFrom)}
    made_from = dataclasses.replace(MADE_FROM, **{name: changes.pop(name) for name in of_model & set(changes)})
    return dataclasses.replace(FACTS, made_from=made_from, **changes)


def tokens_of(text):
    body = text.split("\n---\n", 1)[1]
    return MarkdownIt("commonmark").enable("table").parse(body)


def headings(text):
    tokens = tokens_of(text)
    return [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]


def inline_types(text):
    return {child.type for token in tokens_of(text) for child in token.children or ()}


def test_header_is_the_hubs(tmp_path):
    path = write_model_card(tmp_path, facts())
    assert path == tmp_path / "README.md"
    assert metadata_load(path) == {
        "base_model": "org/Base-1B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["cloq", "gptq_v2", "2-bit", "lora"],
    }
    card = ModelCard.load(path)
    assert card.data.base_model == "org/Base-1B"
    write_model_card(tmp_path, facts(library_name="peft", relation="adapter"))
    data = metadata_load(path)
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert data["tags"] == ["cloq", "gptq_v2", "2-bit", "lora"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


def test_what_is_known_is_shown():
    text = model_card(facts())
    assert headings(text) == [
        r"Base-1B 2-bit gptq\_v2",
        "What it is",
        "Measured",
        "Adapters",
        "How to load it",
        "transformers 5.19",
        "vLLM 0.32",
        "Certificate",
    ]
    for line in (
        "| base model | `org/Base-1B` |",
        "| bits | 2 |",
        "| group size | 64 |",
        "| grid | `asymmetric` |",
        "| adapter rank | 64 |",
        f"| base fingerprint | `{FINGERPRINT}` |",
        "| perplexity | 2 bits with its adapter | 44.871 ± 0.51234 | WikiText-2 test split, 16 x 512 tokens |",
        "| `cloq` | rank 64, dtype `float16` |",
        "| verified | yes |",
        "- Calibrated on 128 windows.",
        "On a GPU.",
    ):
        assert line in text.splitlines(), line
    assert "```python\nmodel = cloq_export.load('x')\n```\n" in text
    assert "```bash\nvllm serve x\n```\n" in text
    assert text.endswith("|\n")
    assert model_card(facts()) == text


def test_what_is_not_known_is_not_said():
    text = model_card(CardFacts(MadeFrom("org/Base-1B", "rtn"), "gptq_v2", FINGERPRINT))
    assert headings(text) == [r"Base-1B gptq\_v2", "What it is"]
    assert "The licence of the base model applies; the files that this was made from do not say which it is." in text
    assert "None" not in text
    assert "measured" not in text
    assert "license" not in text.split("\n---\n")[0]
    text = model_card(facts(bits=(4, 2, 2), group_size=-1, symmetric=True, figures=(), adapters=()))
    assert "| bits | `2/4` |" in text
    assert "| group size | `one group per output channel` |" in text
    assert "| grid | `symmetric` |" in text
    assert "Measured" not in headings(text)
    assert "- 2-bit\n- 4-bit\n" in text


def test_a_base_that_is_not_on_the_hub_is_named_without_its_place():
    for name in ("/home/someone/models/secret-base", r"C:\models\secret-base", "models/x/secret-base/", "secret-base"):
        text = model_card(facts(base_model=name))
        assert "base_model:" not in text
        assert "base_model_relation" not in text
        assert "| base model | `secret-base` |" in text
        assert "home" not in text


@pytest.mark.parametrize(
    "hostile",
    [
        "x\n---\n# Injected\n",
        "a\n---\nlicense: mit\n---\n",
        "org/x\nbase_model: evil",
        "`code` <script>alert(1)</script> ![i](http://e) [l](http://e) | cell | **b** ~~s~~",
        "```\n# Injected\n```",
        "````\n``` # Injected",
        "{{ 7 * 7 }}{% for x in y %}",
        "- item: &a [*a]",
        "!!python/object/apply:os.system ['id']",
        "x\u2028---\u2028# Injected\u202egnp\x00\x1b[31m\r\r\n# Injected",
        "--- ",
        "===",
        "1. one",
        "1) one",
        "+ one",
        "<!-- ",
        "&lt;b&gt; $x$ #tag",
        "\\",
        "|---|\n|---|",
        "x" * 5000,
    ],
)
def test_hostile_texts_stay_where_they_belong(tmp_path, hostile):
    changed = CardFacts(
        made_from=MadeFrom(
            base_model=f"x{hostile}",
            method=f"m{hostile}",
            license=License(hostile, hostile, hostile),
            figures=(Figure(f"n{hostile}", 1.5, f"c{hostile}", hostile),),
        ),
        layout=f"l{hostile}",
        base_fingerprint=FINGERPRINT,
        dtype=hostile,
        library_name=hostile,
        adapters=(CardAdapter(hostile, {hostile: hostile}),),
        engines=(EngineLines(f"e{hostile}", f"s\n{hostile}", hostile, hostile, hostile),),
        certificate={hostile: hostile},
        notes=(f"n{hostile}",),
    )
    path = write_model_card(tmp_path, changed)
    text = path.read_text(encoding="utf-8")
    data = metadata_load(path)
    assert set(data) == {"library_name", "license", "pipeline_tag", "tags"} | (
        {*data} & {"license_name", "license_link"}
    )
    assert data["license"] == "other"
    assert all(isinstance(value, str) and "\n" not in value for value in (*data["tags"], data["license_name"]))
    assert len(headings(text)) == 7
    assert [heading for heading in headings(text) if heading.startswith("Injected")] == []
    tokens = tokens_of(text)
    assert sum(token.type == "fence" for token in tokens) == 1
    assert sum(token.type == "table_open" for token in tokens) == 4
    assert sum(token.type == "hr" for token in tokens) == 0
    assert not any(token.type == "html_block" for token in tokens)
    assert inline_types(text) <= {"text", "code_inline", "text_special", "softbreak"}
    rows = [len(line.replace(r"\|", "").split("|")) for line in text.splitlines() if line.startswith("| ")]
    assert set(rows) <= {4, 6}  # tables of two and of four columns
    assert not {"\x00", "\x1b", "\u2028", "\u202e"} & set(text)


def test_jinja_is_not_read_in_facts():
    assert "{{ 7 * 7 }}" in model_card(facts(method="{{ 7 * 7 }}"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: facts(method=None), "a model card needs method, a text; it is None"),
        (lambda: facts(base_fingerprint=" "), "a model card needs base_fingerprint"),
        (lambda: Figure("perplexity", 3.0, ""), "a figure needs conditions, a text"),
        (lambda: Figure("p", None, "c"), "the figure p is None; only measured numbers"),
        (lambda: Figure("p", float("nan"), "c"), "the figure p is nan"),
        (lambda: Figure("p", True, "c"), "the figure p is True"),
        (lambda: Figure("p", 1, "c", standard_error="x"), "the figure p is 'x'; only measured numbers"),
        (lambda: EngineLines("vLLM", " "), "an? engine of a model card needs snippet"),
    ],
)
def test_facts_that_are_none_are_refused(make, message):
    with pytest.raises(FormatError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content.encode())
    stated = base_license(folder)
    return {} if stated is None else stated.to_json()


def test_licence_of_the_base(tmp_path):
    assert base_license(tmp_path) is None
    assert write(tmp_path, LICENSE="text") == {
        "license": "other",
        "license_name": "license-of-the-base-model",
        "license_link": "LICENSE",
    }
    assert write(tmp_path, config__json='{"license": "mit"}') == {"license": "mit"}
    card = "---\r\nlanguage: en\r\nlicense: other\r\nlicense_name: 'llama3: x'\r\nlicense_link: LICENSE\r\n---\r\n# x\n"
    found = write(tmp_path, README__md=card)
    assert found == {"license": "other", "license_name": "llama3: x", "license_link": "LICENSE"}
    assert "license_name: 'llama3: x'\n" in model_card(facts(license=License(**found)))
    assert write(tmp_path, README__md="---\nlicense:\n- mit\n- apache-2.0\ntags: []\n---\n") == {
        "license": "mit, apache-2.0"
    }


@pytest.mark.parametrize(
    "header",
    [
        "license: {a: b}",
        "license: [",
        "license: !!python/object/apply:os.system ['id']",
        "a: &a [x, x]\nb: &b [*a, *a]\nlicense: *b",
        "license: 3",
        "license: " + "[" * 290,
        "license: \x00",
        "nested:\n  license: mit",
    ],
)
def test_hostile_cards_of_the_base_give_no_licence(tmp_path, header):
    assert write(tmp_path, README__md=f"---\n{header}\n---\n") == {}
    assert write(tmp_path, README__md=f"# no header\n\nlicense: mit\n{header}") == {}


def test_a_card_of_the_base_that_leads_elsewhere_is_not_read(tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "base").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "base" / "README.md")
    with pytest.raises(FormatError, match="is a link that leads out of"):
        base_license(tmp_path / "base")
