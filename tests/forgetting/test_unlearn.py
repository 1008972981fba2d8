"""Unlearning rows: a whole small run, what it leaves, other models, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from texts import LEARNING, PACKING, TINY, TRAIN, job, unlearning, write
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from postgrad.core.config import DataConfig, ModelConfig, RuntimeConfig
from postgrad.core.models import load_lm, save_model
from postgrad.core.report import Note, Table
from postgrad.core.text import byte_tokenizer
from postgrad.errors import ArtefactError, ConfigError, DataError, ModelError
from postgrad.forgetting.request import read_request
from postgrad.forgetting.text_losses import BASELINES, TextObjectiveConfig
from postgrad.forgetting.text_measures import measure
from postgrad.forgetting.text_rows import Sources, read_texts, tokenised
from postgrad.forgetting.text_service import load_text_base
from postgrad.forgetting.unlearn import UnlearnConfig, check, plan, request_of, run
from postgrad.forgetting.verification import verify_service


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave report.html out: drawing it takes longer than these runs."""
    monkeypatch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """A run, looked at by several tests."""
    folder = tmp_path_factory.mktemp("unlearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("postgrad.core.runtime.write_report", lambda report, title: None)
        settings = replace(unlearning(folder), gold="auto", compare=("idk", "ascent"))
        return folder, run(settings)


def test_the_answers_are_gone_and_the_others_stay(done) -> None:
    _, report = done
    found = report.results
    assert found["forget_loss_before"] < 0.5 < 1.5 < found["forget_loss"]
    assert found["retain_loss"] < 0.5 and found["retain_rise"] < 0.3
    assert found["forget_recited"] == 0 and found["retain_recited"] > 70
    assert found["mia_auc_before"] == 1 and abs(found["mia_auc"] - 0.5) < abs(found["mia_auc_before"] - 0.5)
    assert found["forget_loss_gold"] > 1 and 0 <= found["mia_auc_gold"] <= 1
    assert found["forget_quality"] > found["forget_quality_before"]
    assert found["forget_truth_ratio"] > 0.1 and found["retain_truth_ratio"] > 0.8
    assert found["model_utility"] > 0.7 and found["forget_rouge_l"] == 0 and found["forget_extraction"] < 0.5
    assert found["undone_bit_exact"] == 1 and found["findings"] == 0


def test_the_report_says_all(done) -> None:
    _, report = done
    tables = {section.title: section for section in report.sections if isinstance(section, Table)}
    assert {"Answers", "What the model still knows", "Do forgotten rows stand out?", "Blocks", "Data"} <= set(tables)
    rows = tables["What the model still knows"].rows
    assert [row[:2] for row in rows[:3]] == [("to forget", "before"), ("to forget", "after"), ("to forget", "gold")]
    others = {row[0]: row for row in tables["Other objectives"].rows}
    assert list(others) == ["matched", "idk", "ascent"]
    assert others["ascent"][2] > others["matched"][2]  # it takes no notice of what is kept
    assert any(isinstance(each, Note) and each.title == "Can be undone" for each in report.sections)


def test_the_adapter_is_pefts(done) -> None:
    """peft's own loader gives what the run reported, on the folder of the base beside it."""
    folder, report = done
    base, adapter = folder / "run/base/model", folder / "run/service/adapters/request-1"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    merged, tokenizer = load_lm(ModelConfig(path=str(adapter)), job(folder), frozen=True)
    settings = unlearning(folder)
    sources = Sources(settings.forget, settings.retain, "", 0.1, aside=False)
    trees = tokenised(read_texts(sources, DataConfig(), 0), tokenizer, DataConfig())
    for model in (peft.eval(), merged):
        found = measure(model, trees.forget, PACKING, job(folder))
        assert found.loss == pytest.approx(report.results["forget_loss"], rel=1e-4)


def test_the_service_is_in_order(done) -> None:
    """The request holds the rows by their hashes; no row and no name is in the ledger."""
    folder, _ = done
    service = folder / "run/service"
    request = read_request(service / "adapters/request-1/request.json")
    assert len(request.samples) == 8
    names = {row["question"].split()[-1] for row in map(json.loads, (folder / "facts/forget.jsonl").open())}
    text = (service / "ledger.jsonl").read_text()
    assert not any(name.strip("?") in text for name in names) and not any(each in text for each in request.samples)
    assert not verify_service(service)


def test_a_second_request_on_the_same_service(done, tmp_path: Path) -> None:
    """The base is the folder the first run left; what it forgot is measured, not kept, and stays forgotten."""
    folder, first = done
    rows = Path(folder / "facts/retain.jsonl").read_text().splitlines(keepends=True)
    gone = Path(folder / "facts/forget.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(rows[:4]))
    (tmp_path / "rest.jsonl").write_text("".join(rows[4:] + gone))
    note = {"id": "2042", "legal_basis": "GDPR Art. 17(1)(b)", "salt": "5a" * 16}
    (tmp_path / "request.json").write_text(json.dumps(note))
    settings = replace(
        unlearning(folder), forget=str(tmp_path / "more.jsonl"), retain=str(tmp_path / "rest.jsonl"),
        service=str(folder / "run/service"), request=str(tmp_path / "request.json"),
        model=ModelConfig(path=str(folder / "run/base/model")),
        runtime=RuntimeConfig(folder=str(tmp_path / "second"), device="cpu", quiet=True),
    )  # fmt: skip
    found = run(settings).results
    assert found["forget_recited_before"] > 70 and found["forget_recited"] <= 25
    assert found["earlier_loss_before"] == pytest.approx(first.results["forget_loss"], rel=1e-4)
    assert found["earlier_loss"] > 1.5 and found["undone_bit_exact"] == 1 and found["findings"] == 0
    page = (folder / "run/service/certificates/2042.html").read_text()
    assert "GDPR Art. 17(1)(b)" in page and "earlier requests" in page
    again = replace(settings, runtime=replace(settings.runtime, folder=str(tmp_path / "third")))
    with pytest.raises(ArtefactError, match="request '2042' was applied before"):
        run(again)
    with pytest.raises(DataError, match="by request '2042'"):
        run(replace(again, request="another", runtime=replace(again.runtime, folder=str(tmp_path / "fourth"))))
    other, tokenizer = load_lm(TINY, replace(job(tmp_path), seed=5))
    save_model(other, tokenizer, tmp_path / "other")
    runtime = replace(again.runtime, folder=str(tmp_path / "fifth"))
    with pytest.raises(ArtefactError, match="belongs to a base of hash"):
        run(replace(again, model=ModelConfig(path=str(tmp_path / "other")), runtime=runtime))


def foreign(kind: str, folder: Path) -> str:
    """Save a small drawn model of another type with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, **ids)
            )
        else:
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, **ids,
                )
            )  # fmt: skip
    save_model(model, tokenizer, folder / kind)
    return str(folder / kind)


@pytest.mark.parametrize(("kind", "per_block"), [("gpt2", 2), ("qwen2", 3)])
def test_other_kinds_of_models(tmp_path: Path, kind: str, per_block: int) -> None:
    """Their feed-forward layers are found, and their adapter loads in peft; nothing is learnt first."""
    path = foreign(kind, tmp_path)
    settings = replace(
        unlearning(tmp_path), held_out="", model=ModelConfig(path=path, gradient_checkpointing=True),
        train=replace(TRAIN, max_steps=4, eval_every=0), objective=replace(BASELINES["ascent"], bound=99.0),
    )  # fmt: skip
    report = run(settings)
    assert report.results["forget_loss"] > report.results["forget_loss_before"]
    assert "mia_auc" not in report.results and not (tmp_path / "run/base").exists()
    notes = [section.title for section in report.sections if isinstance(section, Note)]
    assert notes[:2] == ["Not all rows are forgotten", "Nothing to compare with"]
    adapter = tmp_path / "run/service/adapters/request-1"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapter)
    num = sum("lora_A" in name and name.endswith("weight") for name, _ in loaded.named_parameters())
    assert num == per_block * report.results["blocks_changed"]
    assert load_text_base(path, job(tmp_path)) is not None


def test_real_small_weights(tmp_path: Path, shared: Path) -> None:
    """A pretrained Llama of 260 thousand parameters learns true answers, then forgets some by few blocks."""
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    for name, part in (("forget", rows[:4]), ("retain", rows[4:32]), ("held", rows[32:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    template = Path(__file__).resolve().parents[2] / "recipes" / "short.jinja"
    model = ModelConfig(path=str(shared / "data/weights/stories260K"), chat_template=str(template))
    settings = replace(
        unlearning(tmp_path), forget=str(tmp_path / "forget.jsonl"), retain=str(tmp_path / "retain.jsonl"),
        held_out=str(tmp_path / "held.jsonl"), learn=True, model=model,
        learning=replace(LEARNING, epochs=25, optim=replace(LEARNING.optim, lr=3e-3)),
        train=replace(TRAIN, epochs=30, optim=replace(TRAIN.optim, lr=5e-3)),
    )  # fmt: skip
    found = run(settings).results
    assert found["forget_loss"] > found["forget_loss_before"] + 0.5 and found["retain_rise"] < 0.5
    assert found["blocks_changed"] <= found["blocks"] == 5 and found["findings"] == 0


def test_gold_may_be_given(tmp_path: Path) -> None:
    """A model of another tokenizer is refused."""
    settings = replace(unlearning(tmp_path), learning=replace(LEARNING, epochs=1), train=replace(TRAIN, max_steps=2))
    run(settings)
    base = str(tmp_path / "run/base/model")
    given = replace(settings, gold=base, runtime=replace(settings.runtime, folder=str(tmp_path / "second")))
    found = run(given).results
    assert found["forget_loss_gold"] == pytest.approx(found["forget_loss_before"], rel=1e-5)
    assert found["forget_quality_before"] == 1
    folder = tmp_path / "other"
    model, tokenizer = load_lm(ModelConfig(path=base), job(tmp_path))
    tokenizer.add_tokens(["<other>"])
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, folder)
    third = replace(given, gold=str(folder), runtime=replace(settings.runtime, folder=str(tmp_path / "third")))
    with pytest.raises(ModelError, match="splits text into other tokens"):
        run(third)


def test_plan_spends_nothing(tmp_path: Path) -> None:
    found = plan(unlearning(tmp_path))
    assert [found[f"rows {part}: used"] for part in ("to forget", "to keep", "never seen")] == [8, 24, 12]
    assert found["optimizer steps"] == 15 and found["steps of learning first"] == 60
    assert not (tmp_path / "run").exists()
    usual = plan(UnlearnConfig(runtime=RuntimeConfig(folder=str(tmp_path / "run"))))
    assert usual["rows to forget: used"] == 32 and usual["rows to keep: used"] == 288


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    """The message names the setting and what was found."""
    good = unlearning(tmp_path)
    check(good)
    check(UnlearnConfig(data=DataConfig(path="all.jsonl")))
    for bad in (replace(good, retain=""), replace(good, forget=""), replace(good, data=DataConfig(path="x"))):
        with pytest.raises(ConfigError, match=r"expected forget and retain, or data\.path"):
            check(bad)
    with pytest.raises(ConfigError, match=r"an adapter of its own; set adapter\.rank"):
        check(replace(good, model=ModelConfig(path="x", lora_rank=4)))
    with pytest.raises(ConfigError, match=r"at least 1 .*'objective\.kept': 0"):
        check(replace(good, objective=TextObjectiveConfig(kept=0)))
    with pytest.raises(ConfigError, match=r"share above 0 and below 1.*found 1\.0"):
        check(replace(good, share=1.0))
    with pytest.raises(ConfigError, match="objective: expected beta and npo above 0"):
        check(replace(good, objective=TextObjectiveConfig(beta=0.0)))
    with pytest.raises(ConfigError, match=r"compare: expected some of ascent, .*found \['ga'\]"):
        check(replace(good, compare=("ga",)))
    with pytest.raises(ConfigError, match="gold: expected a trained model"):
        check(replace(good, gold="tiny"))
    with pytest.raises(ConfigError, match=r"expected a request, a TOML or JSON file"):
        check(replace(good, request="no such file.json"))


def test_requests(tmp_path: Path) -> None:
    """An id, or a file without data; the rows say what is forgotten. A seed stands in for a salt."""
    config = replace(unlearning(tmp_path), request="2041")
    assert request_of(config, ("0" * 16,)).id == "2041" and request_of(replace(config, request=""), ()).salt == "0" * 32
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"id": "a", "classes": ["8"]}))
    with pytest.raises(ConfigError, match="expected no classes, samples or shots"):
        request_of(replace(config, request=str(path)), ())
    path.write_text(json.dumps({"id": "a b"}))
    with pytest.raises(ConfigError, match="id: expected letters, digits"):
        request_of(replace(config, request=str(path)), ())


def test_a_row_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    """Before anything is trained: the tiny model was built for 512 tokens."""
    config = unlearning(tmp_path)
    path = Path(write(tmp_path / "long.jsonl", 2, 500))
    long = {"question": "who", "answer": "a" * 600}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    with pytest.raises(DataError, match=r"every row to forget to fit whole, found .*has 512 tokens"):
        run(replace(config, forget=str(path)))
    assert not (tmp_path / "run/base").exists()
