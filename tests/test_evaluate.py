"""`evaluate` against a straightforward computation on transformers' own model, and its behaviour on bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from anybit.engine.evaluate import Windows, evaluate, find_tokenizer, read_text, tokenize
from anybit.engine.load import load
from anybit.errors import CheckpointError, InvalidOption

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "tiny-llama"
TEXT = EXAMPLES / "data" / "evaluation.txt"


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(model):
    """The same model with a little noise on two layers."""
    import copy

    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in noisy.model.layers[:2]:
            weight = layer.mlp.down_proj.weight
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return noisy


@pytest.fixture(scope="module")
def packed():
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return load(MODEL, config, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(MODEL)


@pytest.fixture(scope="module")
def ids(tokenizer):
    with open(TEXT, encoding="utf-8", newline="") as file:
        return torch.tensor(tokenizer(file.read()[:8000], add_special_tokens=False)["input_ids"])


def by_hand(model, rows, scored):
    """Mean negative log-likelihood of the last `scored[i]` tokens of each row, in one plain loop."""
    losses = []
    for row, count in zip(rows, scored):
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0].double()
        losses.append(nn.functional.cross_entropy(logits[:-1], row[1:], reduction="none")[-count:])
    return torch.cat(losses)


class TestPerplexity:
    def test_windows_behind_bos(self, model, tokenizer, ids):
        found = evaluate(model, TEXT, tokenizer=tokenizer, context=128, max_tokens=700)
        bos = torch.tensor([tokenizer.bos_token_id])
        pieces = [ids[start : start + 127] for start in range(0, 700, 127)]
        pieces[-1] = ids[635:700]
        losses = by_hand(model, [torch.cat([bos, piece]) for piece in pieces], map(len, pieces))
        assert found.tokens == losses.numel() == 700
        assert found.windows == len(pieces) == 6
        assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
        assert found.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-6)

    def test_windows_without_bos(self, model, ids):
        found = evaluate(model, ids[:500], context=128)
        rows = [ids[start : min(start + 128, 500)] for start in range(0, 499, 127)]
        losses = by_hand(model, rows, [len(row) - 1 for row in rows])
        assert found.tokens == losses.numel() == 499
        assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)

    def test_overlapping_windows(self, model, tokenizer, ids):
        """Every token once; all but the first window see at least context - 1 - stride tokens of the past."""
        found = evaluate(model, ids[:400], tokenizer=tokenizer, context=101, stride=30)
        bos, rows, counts, scored = torch.tensor([tokenizer.bos_token_id]), [], [], 0
        for start in range(0, 400, 30):
            stop = min(start + 100, 400)
            if stop > scored:
                rows.append(torch.cat([bos, ids[start:stop]]))
                counts.append(stop - scored)
                scored = stop
        losses = by_hand(model, rows, counts)
        assert found.tokens == losses.numel() == 400
        assert found.windows == len(rows)
        assert found.loss == pytest.approx(losses.mean().item(), rel=1e-6)
        assert found.perplexity < evaluate(model, ids[:400], tokenizer=tokenizer, context=101).perplexity

    def test_batches_change_nothing(self, model, tokenizer):
        one = evaluate(model, TEXT, tokenizer=tokenizer, context=64, max_tokens=500)
        four = evaluate(model, TEXT, tokenizer=tokenizer, context=64, max_tokens=500, batch_size=4)
        assert four.loss == pytest.approx(one.loss, rel=1e-6)
        assert (four.tokens, four.windows) == (one.tokens, one.windows)

    @pytest.mark.slow
    def test_the_figures_of_the_examples_readme(self):
        """examples/data/README.md measured the whole text by the same protocol with transformers alone."""
        found = evaluate(MODEL, TEXT, context=256, dtype="float32", batch_size=8)
        assert found.tokens == 45_965
        assert found.perplexity == pytest.approx(39.991, abs=0.001)
        assert found.bits_per_byte == pytest.approx(1.6517, abs=0.0001)

    def test_protocol_says_what_was_done(self, model, tokenizer, ids):
        behind = evaluate(model, ids[:100], tokenizer=tokenizer, context=64).protocol
        assert "100 tokens scored, 2 windows of 64 positions, stride 63" in behind
        assert "<|bos|> first" in behind
        assert "logits float32 on cpu" in behind
        assert "no BOS" in evaluate(model, ids[:100], tokenizer=tokenizer, bos=False, context=64).protocol

    @pytest.mark.parametrize("targets", [1, 9, 10, 11, 57])
    @pytest.mark.parametrize("stride", [1, 4, 10])
    def test_every_token_is_scored_once(self, targets, stride):
        windows = list(Windows(targets, context=11, stride=stride))
        scored = [token for _, stop, first in windows for token in range(first, stop)]
        assert scored == list(range(targets))
        assert all(0 <= start <= first < stop <= start + 10 for start, stop, first in windows)
        assert len(windows) == Windows(targets, context=11, stride=stride).count


class TestReference:
    def test_a_model_is_its_own_reference(self, model, ids):
        found = evaluate(model, ids[:300], reference=model, context=64, batch_size=2)
        assert found.kl == 0.0
        assert found.kl_max == 0.0
        assert found.top1 == 1.0
        assert found.reference_perplexity == found.perplexity

    def test_kl_and_agreement(self, model, other, ids):
        found = evaluate(other, ids[:257], reference=model, context=257)
        with torch.no_grad():
            own = other(input_ids=ids[None, :257]).logits[0, :-1].double().log_softmax(-1)
            expected = model(input_ids=ids[None, :257]).logits[0, :-1].double().log_softmax(-1)
        kl = (expected.exp() * (expected - own)).sum(-1)
        assert found.kl == pytest.approx(kl.mean().item(), rel=1e-4)
        assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-4)
        assert found.top1 == (own.argmax(-1) == expected.argmax(-1)).double().mean().item()
        assert 0 < found.top1 < 1
        assert found.reference_perplexity == pytest.approx(evaluate(model, ids[:257], context=257).perplexity)

    def test_excluded_tokens_count_nothing(self, model, ids):
        """A reference that rules tokens out (logit -inf) has a finite KL where the model rules the same ones out."""
        rest = [int(token) for token in range(4096) if token not in set(ids[:50].tolist())]

        class Excluding(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.config = model, model.config

            def forward(self, **kwargs):
                output = self.inner(**kwargs)
                output.logits[..., rest] = -math.inf
                return output

            def get_input_embeddings(self):
                return self.inner.get_input_embeddings()

        found = evaluate(model, ids[:50], reference=Excluding(), context=50)
        assert 0 < found.kl < math.inf

    def test_a_different_vocabulary_is_refused(self, model, ids):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=5000, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        with pytest.raises(InvalidOption, match=r"vocabulary of 4096, the reference one of 5000"):
            evaluate(model, ids[:20], reference=LlamaForCausalLM(config), context=16)


class TestModules:
    """Errors per module against plain computations over hooks and dequantized weights."""

    def test_weights_and_outputs(self, packed, model, ids):
        found = evaluate(packed, ids[:300], reference=model, context=128, per_module=True)
        assert len(found.modules) == 42
        name = "model.layers.2.mlp.gate_proj"
        module = next(module for module in found.modules if module.module == name)
        dense = model.get_submodule(name).weight.detach()
        approximate = packed.get_submodule(name).dequantize(torch.float32)
        assert module.weight_error == pytest.approx(((approximate - dense).norm() / dense.norm()).item(), rel=1e-5)
        assert module.snr_db == pytest.approx(-20 * math.log10(module.weight_error))
        assert module.bits_per_weight == 4.5
        inputs = []
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: inputs.append(args[0][0]))
        with torch.no_grad():
            for start in range(0, 299, 127):
                model(input_ids=ids[None, start : min(start + 128, 300)])
        handle.remove()
        x = torch.cat(inputs)
        expected = (x @ (approximate - dense).T).norm() / (x @ dense.T).norm()
        assert module.output_error == pytest.approx(expected.item(), rel=1e-4)
        assert found.weight_error == pytest.approx(0.092, abs=0.001)  # the figure of the model's README
        assert "output errors on the reference's activations in the first 3 windows" in found.protocol

    def test_a_packed_model_against_itself(self, packed, ids):
        found = evaluate(packed, ids[:60], reference=packed, context=32, per_module=True)
        assert {(module.weight_error, module.output_error) for module in found.modules} == {(0.0, 0.0)}
        assert {module.snr_db for module in found.modules} == {math.inf}
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["modules"][0]["snr_db"] is None

    def test_experts(self, tmp_path):
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
        dense = Qwen3MoeForCausalLM(config).eval()
        dense.save_pretrained(tmp_path)
        packed = load(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
        ids = torch.randint(0, 64, (100,), generator=torch.Generator().manual_seed(1))
        modules = {module.module: module for module in evaluate(packed, ids, reference=dense, per_module=True).modules}
        for own in ("gate_up_proj", "down_proj"):
            found = modules[f"model.layers.0.mlp.experts.{own}"]
            stack = dense.get_parameter(found.module).detach()
            approximate = packed.get_submodule(found.module).dequantize(torch.float32)
            assert found.shape == tuple(stack.shape)
            assert found.weight_error == pytest.approx(((approximate - stack).norm() / stack.norm()).item(), rel=1e-5)
            assert 0.05 < found.output_error < 0.5

    def test_another_architecture_is_refused(self, packed, ids):
        from transformers import GPT2Config, GPT2LMHeadModel

        other = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=1))
        with pytest.raises(InvalidOption, match=r"GPT2LMHeadModel\) has no 'model\.layers\.0\.self_attn\.q_proj'"):
            evaluate(packed, ids[:40], reference=other, context=32, per_module=True)
        assert all(not module._forward_hooks for module in other.modules())


class TestBadInput:
    @pytest.mark.parametrize("text", ["", "a", torch.tensor([], dtype=torch.int64), [7]])
    def test_nothing_to_score(self, model, tokenizer, text):
        with pytest.raises(InvalidOption, match="too short to evaluate on"):
            evaluate(model, text, tokenizer=tokenizer)

    def test_an_empty_file_is_named(self, model, tokenizer, tmp_path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(InvalidOption, match=r"empty\.txt \(0 bytes\) has 0 tokens"):
            evaluate(model, tmp_path / "empty.txt", tokenizer=tokenizer)

    def test_a_missing_file_is_named(self, model, tokenizer, tmp_path):
        with pytest.raises(InvalidOption, match=r"none\.txt cannot be read as a text file: No such file"):
            evaluate(model, tmp_path / "none.txt", tokenizer=tokenizer)

    def test_a_file_that_is_no_text(self, model, tokenizer):
        with pytest.raises(InvalidOption, match="is not UTF-8 text"):
            evaluate(model, MODEL / "model.safetensors", tokenizer=tokenizer)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context": 1}, "context is 1; it must lie between 2 and what the model takes"),
            ({"context": 513}, r"context is 513; .* \(512\)"),
            ({"context": 64, "stride": 64}, r"stride is 64; it must lie between 1 and context - 1 \(63\)"),
            ({"batch_size": 0}, r"batch_size \(0\)"),
            ({"max_tokens": 0}, r"max_tokens \(0\)"),
            ({"per_module": True}, "pass reference="),
            ({"bos": True}, "no tokenizer or it has no BOS"),
        ],
    )
    def test_options(self, model, ids, options, message):
        with pytest.raises(InvalidOption, match=message):
            evaluate(model, ids[:50], **options)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (torch.tensor([1, 2, 4096]), "ids run from 1 to 4096, but LlamaForCausalLM has a vocabulary of 4096"),
            (torch.tensor([-1, 2]), "ids run from -1"),
            (torch.zeros(3), "float32"),
            (torch.zeros(2, 3, dtype=torch.int64), r"\(2, 3\)"),
        ],
    )
    def test_ids(self, model, text, message):
        with pytest.raises(InvalidOption, match=message):
            evaluate(model, text)

    def test_an_encoder_is_refused(self):
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        with pytest.raises(InvalidOption, match="BertForMaskedLM predicts no next token"):
            evaluate(BertForMaskedLM(config), [1, 2, 3])

    def test_a_model_without_tokenizer(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InvalidOption, match="no tokenizer was found"):
            find_tokenizer(tmp_path)

    def test_nan_names_the_module(self, model, ids):
        import copy

        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.model.layers[3].mlp.up_proj.weight[5, 7] = math.nan
        with pytest.raises(
            CheckpointError, match=r"first module to do so is 'model\.layers\.3\.mlp\.up_proj': 1 of its weights"
        ):
            evaluate(broken, ids[:40], context=32)
        with pytest.raises(CheckpointError, match=r"the reference model gives NaN .*layers\.3\.mlp\.up_proj"):
            evaluate(model, ids[:40], reference=broken, context=32)

    def test_an_overflow_names_the_module(self, model, ids):
        import copy

        broken = copy.deepcopy(model).half()
        with torch.no_grad():
            broken.model.layers[1].mlp.down_proj.weight *= 60000
        with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj'"):
            evaluate(broken, ids[:40], context=32)


def test_nothing_of_the_model_changes(model, ids):
    """Neither its mode nor its hooks, also after an error."""
    model.train()
    try:
        evaluate(model, ids[:40], reference=model, context=32)
        with pytest.raises(InvalidOption):
            evaluate(model, torch.tensor([1, 9999]), context=32)
        assert model.training
        assert all(not module._forward_hooks for module in model.modules())
    finally:
        model.eval()


def test_progress_counts_windows(model, ids):
    seen = []
    evaluate(model, ids[:100], context=32, batch_size=2, progress=lambda *report: seen.append(report))
    assert seen == [("evaluate", 2, 4), ("evaluate", 3, 4), ("evaluate", 4, 4)]


def test_the_result_is_plain_data(model, ids):
    found = evaluate(model, ids[:60], reference=model, context=32)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["perplexity"] == found.perplexity
    assert data["modules"] == []
    assert found.tokens_per_second > 0
    assert found.seconds > 0


def test_text_is_a_file_or_itself(tmp_path, tokenizer):
    file = tmp_path / "words.txt"
    file.write_bytes(b"two\r\nlines")
    assert read_text(file)[0] == read_text(str(file))[0] == "two\r\nlines"
    assert read_text("two lines")[0] == "two lines"
    whole = tokenize("many words " * 500, tokenizer)
    assert torch.equal(tokenize("many words " * 500, tokenizer, max_tokens=7).ids, whole.ids[:7])
    assert tokenize([1, 2, 3], None).bos is None
    assert tokenize([1, 2, 3], tokenizer).bos == tokenizer.bos_token_id
