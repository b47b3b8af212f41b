"""Draft and verify: the verifier's own text and distribution, whatever the drafter proposes, and vLLM's counts."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import VISION
from test_architectures import long_rope
from test_extract import VOCAB, tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    Gemma3Config,
    LlamaForCausalLM,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
    set_seed,
)

from peagle_hf import PeagleConfig, PeagleError, PeagleForSpeculation
from peagle_hf.model.generation import accept, draft_and_verify

PAD, NEW_TOKENS = 3, 24


def make_drafter(verifier, seed=0, num_depths=3, num_layers=2, window=None, model_type="llama", **fields):
    set_seed(seed)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    layer = {name: getattr(verifier.config, name) for name in sizes}
    layer |= {"model_type": model_type, "num_hidden_layers": num_layers, "head_dim": 8, "initializer_range": 0.2}
    if window:
        layer |= {"sliding_window": window, "layer_types": ["sliding_attention"] * num_layers}
        layer |= {"use_sliding_window": True} if model_type == "qwen3" else {}
    config = PeagleConfig(
        transformer_layer_config=layer,
        speculators_config={"verifier": {"name_or_path": "verifier"}},
        mask_token_id=PAD,
        eagle_aux_hidden_state_layer_ids=[2, 3, 4],
        num_depths=num_depths,
        **fields,
    )
    return PeagleForSpeculation(config).eval()


@pytest.fixture(scope="module")
def verifier(tiny_verifier):
    return LlamaForCausalLM.from_pretrained(tiny_verifier).eval()


def padded(lengths, seed=0, vocab_size=96):
    """Left-padded prompts, as keyword arguments of `generate`."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths])
    ids = torch.randint(4, vocab_size, (len(lengths), longest), generator=generator)
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long(), "pad_token_id": PAD}


class Oracle(PeagleForSpeculation):
    """A drafter that knows the answers and, by chance, says something else instead."""

    answers: torch.Tensor
    error_rate: float

    def draft(self, input_ids, hidden_states, mask, num_depths, cache):
        scores = super().draft(input_ids, hidden_states, mask, num_depths, cache)
        for row, length in enumerate((mask.sum(1) + 1).tolist()):
            left = self.answers[row][length : length + num_depths]
            wrong = torch.rand(left.numel(), generator=self.generator) < self.error_rate
            scores[row, torch.arange(left.numel()), torch.where(wrong, 5, left)] += 1e4
        return scores


def make_oracle(verifier, inputs, error_rate, num_depths=3, **options):
    oracle = make_drafter(verifier, num_depths=num_depths)
    oracle.__class__ = Oracle
    sequences = verifier.generate(**inputs, **options)
    oracle.answers = [row[(mask == 0).sum() :] for row, mask in zip(sequences, inputs["attention_mask"], strict=True)]
    oracle.error_rate, oracle.generator = error_rate, torch.Generator().manual_seed(0)
    return oracle, sequences


GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
ASSISTED = {"custom_generate": draft_and_verify, "return_dict_in_generate": True}


@pytest.mark.parametrize("lengths", [(1,), (9,), (2, 11, 5, 7)])
@pytest.mark.parametrize("error_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_depths", [1, 4])
def test_greedy_text_is_the_verifiers_own(verifier, lengths, error_rate, num_depths):
    inputs = padded(lengths)
    oracle, expected = make_oracle(verifier, inputs, error_rate, num_depths, **GREEDY)
    output = verifier.generate(**inputs, **GREEDY, **ASSISTED, drafter=oracle)
    assert torch.equal(output.sequences, expected)
    assert torch.equal(
        verifier.generate(**inputs, **GREEDY, custom_generate=draft_and_verify, drafter=oracle), expected
    )
    assert (sum(output.accepted_by_position) > 0) == (error_rate < 1)


def test_what_is_right_is_always_accepted(verifier):
    inputs = padded((6, 9))
    oracle, expected = make_oracle(verifier, inputs, 0.0, max_new_tokens=60, do_sample=False, eos_token_id=-1)
    output = verifier.generate(
        **inputs, **ASSISTED, drafter=oracle, max_new_tokens=41, do_sample=False, eos_token_id=-1
    )
    assert torch.equal(output.sequences, expected[:, : 9 + 41])
    # The first token needs no draft. Each later round brings one token and three drafted ones.
    assert (output.num_drafts, output.accepted_by_position) == (20, [20, 20, 20])
    assert output.acceptance_length == 4


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 6])
def test_text_ends_after_max_new_tokens(verifier, max_new_tokens):
    inputs = padded((6, 9))
    options = {"do_sample": False, "eos_token_id": -1}
    oracle, expected = make_oracle(verifier, inputs, 0.0, max_new_tokens=20, **options)
    output = verifier.generate(**inputs, **options, **ASSISTED, drafter=oracle, max_new_tokens=max_new_tokens)
    assert torch.equal(output.sequences, expected[:, : 9 + max_new_tokens])
    assert output.num_drafts == 2 * -(-(max_new_tokens - 1) // 4)


def test_text_ends_at_eos_in_the_middle_of_what_is_accepted(verifier):
    inputs = padded((6, 9))
    free, _ = make_oracle(verifier, inputs, 0.0, max_new_tokens=20, do_sample=False, eos_token_id=-1)
    for place in range(1, 9):
        eos = int(free.answers[1][9 + place])
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [2, eos]}
        output = verifier.generate(**inputs, **options, **ASSISTED, drafter=free)
        assert torch.equal(output.sequences, verifier.generate(**inputs, **options))
        assert int(output.sequences[1][9:].tolist().index(eos)) <= place


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 15},
        {"encoder_repetition_penalty": 1.7, "encoder_no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda number, text: [*range(int(text[-1]) % 2 + 2 * number, 96, 5)]},
    ],
    ids=["text", "prompt", "number"],
)
def test_processors_see_each_text_as_it_is_and_where_it_stands_in_the_batch(verifier, options):
    inputs = padded((6, 9))
    options = GREEDY | options
    oracle, expected = make_oracle(verifier, inputs, 0.2, **options)
    output = verifier.generate(**inputs, **options, **ASSISTED, drafter=oracle)
    assert torch.equal(output.sequences, expected)
    assert sum(output.accepted_by_position) > 0


def test_a_window_of_the_verifier_is_kept_for_one_prompt_and_refused_for_several():
    set_seed(0)
    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
            initializer_range=0.2,
        )
    ).eval()
    inputs = padded((9,))
    oracle, expected = make_oracle(windowed, inputs, 0.3, **GREEDY)
    assert torch.equal(windowed.generate(**inputs, **GREEDY, **ASSISTED, drafter=oracle).sequences, expected)
    with pytest.raises(PeagleError, match="sliding window"):
        windowed.generate(**padded((9, 8)), **GREEDY, **ASSISTED, drafter=oracle)


def test_the_text_of_a_multimodal_verifier_is_its_own():
    """From transformers 5.24 on `generate` passes such a model the states of its images, without images none."""
    text = tiny("gemma3_text", num_hidden_layers=7, vocab_size=96, hidden_size=32, intermediate_size=64)
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=1)
    set_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs, drafter = padded((9,)), make_drafter(SimpleNamespace(config=text))
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, **ASSISTED, drafter=drafter).sequences, expected)


def test_a_text_that_would_be_rotated_otherwise_at_its_end_is_refused():
    set_seed(0)
    model = AutoModelForCausalLM.from_config(long_rope(29)).eval()
    drafter = make_drafter(model)
    options = {**ASSISTED, "do_sample": False, "drafter": drafter, "eos_token_id": -1}
    inputs = padded((9,), vocab_size=VOCAB)
    with pytest.raises(PeagleError, match=r"another one for texts of more than 29 tokens.*\(30\)"):
        model.generate(**inputs, **options, max_new_tokens=18)
    for prompt, max_new_tokens in ((inputs, 17), (padded((30,), vocab_size=VOCAB), 9)):
        expected = model.generate(**prompt, do_sample=False, eos_token_id=-1, max_new_tokens=max_new_tokens)
        assert torch.equal(model.generate(**prompt, **options, max_new_tokens=max_new_tokens).sequences, expected)


def test_what_is_not_supported_is_refused_by_name(verifier, tiny_verifier):
    drafter = make_drafter(verifier)
    with pytest.raises(PeagleError, match="beam search"):
        verifier.generate(**padded((5,)), **ASSISTED, drafter=drafter, max_new_tokens=4, num_beams=2)
    with pytest.raises(PeagleError, match="draft_sample_method is 'random'"):
        verifier.generate(**padded((5,)), **GREEDY, **ASSISTED, drafter=drafter, draft_sample_method="random")
    with pytest.raises(PeagleError, match="guidance_scale"):
        verifier.generate(**padded((5,)), **GREEDY, **ASSISTED, drafter=drafter, guidance_scale=1.5)
    for number in (0, -1, 2.5):
        with pytest.raises(PeagleError, match=f"num_speculative_tokens is {number}"):
            verifier.generate(**padded((5,)), **GREEDY, **ASSISTED, drafter=drafter, num_speculative_tokens=number)
    wanted = {"output_scores": True, "output_logits": True}
    with pytest.raises(PeagleError, match="not supported: output_scores, output_logits"):
        verifier.generate(**padded((5,)), **GREEDY, **ASSISTED, **wanted, drafter=drafter)
    right = padded((5, 7))
    right |= {name: right[name].flip(1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(PeagleError, match="padded on the right"):
        verifier.generate(**right, **GREEDY, **ASSISTED, drafter=drafter)
    verifier.config.hidden_size, sizes = 64, verifier.config.hidden_size
    try:
        with pytest.raises(PeagleError, match=r"hidden size 32.*64"):
            verifier.generate(**padded((5,)), **GREEDY, **ASSISTED, drafter=drafter)
    finally:
        verifier.config.hidden_size = sizes


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_drafting_bit_by_bit_gives_what_the_rows_of_training_give(verifier, model_type, num_layers, window):
    """The cache, the holes in it and the padding change nothing: every draft equals a forward pass over all rows."""
    depths, lengths = 4, (13, 9)
    drafter = make_drafter(verifier, num_layers=num_layers, window=window, model_type=model_type, num_depths=depths)
    tokens = torch.randint(4, 96, (2, 13))
    states = torch.randn(2, 13, 3 * drafter.config.hidden_size)
    cache, mask = DynamicCache(), torch.zeros(2, 0, dtype=torch.bool)
    done = [0, 0]
    for counts in [(3, 1), (4, 3), (1, 4), (5, 1)]:  # new positions of each sequence, call by call
        new = max(counts)
        chosen = [torch.arange(first, first + new).clamp(max=12) for first in done]
        real = torch.stack([torch.arange(new) < count for count in counts])
        if not mask.shape[1]:
            chosen[1], real[1] = chosen[1].roll(2) * 0, torch.tensor([False, False, True])  # padding on the left
        mask = torch.cat([mask, real], dim=1)
        scores = drafter.draft(
            torch.stack([tokens[row][index] for row, index in enumerate(chosen)]),
            torch.stack([states[row][index] for row, index in enumerate(chosen)]),
            mask,
            depths,
            cache,
        )
        done = [before + count for before, count in zip(done, counts, strict=True)]
        for row, length in enumerate(done):
            anchors = torch.tensor([*range(length), *[length - 1] * (depths - 1)])
            at_depth = torch.tensor([*[0] * length, *range(1, depths)])
            whole = drafter(
                input_ids=tokens[row : row + 1, :length],
                hidden_states=states[row : row + 1, :length],
                anchors=anchors[None],
                depths=at_depth[None],
                document_ids=torch.zeros(1, length, dtype=torch.long),
                position_ids=(anchors + at_depth)[None],
            ).logits[0, -depths:]
            torch.testing.assert_close(scores[row], whole, rtol=1e-4, atol=1e-5)
    assert done == list(lengths)


@pytest.mark.parametrize(
    ("draft_vocab_size", "options", "method"),
    [
        (None, {"temperature": 0.7}, "probabilistic"),
        (40, {"temperature": 0.7}, "greedy"),
        (40, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}, "probabilistic"),
        (None, {"temperature": 1.3, "top_k": 20, "top_p": 0.9}, "greedy"),
    ],
)
def test_sampled_text_is_distributed_as_the_verifiers(verifier, draft_vocab_size, options, method):
    """Chi-square of pairs of tokens, drafted and not, against the verifier's exact probabilities."""
    drafter = make_drafter(verifier, draft_vocab_size=draft_vocab_size)
    if draft_vocab_size:
        kept = torch.arange(96)[torch.arange(96) % 12 < 5]
        t2d = torch.zeros(96, dtype=torch.bool).index_fill_(0, kept, True)
        drafter.set_draft_vocabulary(kept - torch.arange(40), t2d)
    copies, prompt = 2000, padded((5,))
    options = {"do_sample": True, "top_k": 0, "eos_token_id": -1, "max_new_tokens": 3, "pad_token_id": PAD, **options}
    inputs = {
        "input_ids": prompt["input_ids"].expand(copies, -1),
        "attention_mask": prompt["attention_mask"].expand(copies, -1),
    }
    set_seed(0)
    output = verifier.generate(**inputs, **options, **ASSISTED, drafter=drafter, draft_sample_method=method)
    assert 0 < output.accepted_by_position[0] < output.num_drafts
    assert output.accepted_by_position[1] > 0 or method == "greedy"  # the drafter is a random one
    new = output.sequences[:, 5:]

    processors = verifier._get_logits_processor(verifier._prepare_generation_config(None, **options)[0])
    for place in (1, 2):  # the first token comes with the prompt
        prefixes, number = new[:, :place].unique(dim=0, return_inverse=True)
        texts = torch.cat([prompt["input_ids"].expand(len(prefixes), -1), prefixes], dim=1)
        with torch.no_grad():
            exact = processors(texts, verifier(texts).logits[:, -1]).softmax(-1)
        expected = exact[number].sum(0)
        found = torch.bincount(new[:, place], minlength=96)
        assert (found[expected == 0] == 0).all()
        frequent = expected >= 5
        rest = torch.stack([expected[~frequent].sum(), found[~frequent].sum()])
        statistic = ((found - expected) ** 2 / expected)[frequent].sum()
        if rest[0] >= 5:
            statistic += (rest[1] - rest[0]) ** 2 / rest[0]
        freedom = int(frequent.sum())
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
@pytest.mark.parametrize("narrowed", ["both", "verifier"], ids=lambda which: f"{which} narrowed")
def test_acceptance_is_that_of_an_enumeration_with_top_k_and_top_p(narrowed, method):
    """All outcomes of two drafted tokens; in vLLM only the verifier's distributions are narrowed."""
    copies, vocab = 200_000, 6
    logits = torch.randn(5, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    narrow = LogitsProcessorList([TopKLogitsWarper(5), TopPLogitsWarper(0.8)])
    p, q = narrow(None, logits[:3]).softmax(-1), logits[3:].softmax(-1)
    if narrowed == "both":
        q = narrow(None, logits[3:]).softmax(-1)
    if method == "greedy":
        q = torch.nn.functional.one_hot(q.argmax(-1), vocab).double()
    assert (p == 0).any(1).all()

    expected, first = Counter(), torch.zeros(vocab, dtype=torch.float64)
    for drafts in itertools.product(range(vocab), repeat=2):
        reached = float(q[0, drafts[0]] * q[1, drafts[1]])
        for place in range(3):
            taken = min(1.0, float(p[place, drafts[place]] / q[place, drafts[place]])) if reached and place < 2 else 0.0
            left = (p[place] - q[place]).clamp(min=0) if place < 2 else p[place]
            for token in range(vocab) if reached and taken < 1 else ():
                expected[(place, *drafts[:place], token)] += reached * (1 - taken) * float(left[token] / left.sum())
            reached *= taken
    for (count, *tokens), chance in expected.items():
        first[tokens[0]] += chance
        assert count == len(tokens) - 1
    torch.testing.assert_close(first, p[0])  # the text is the verifier's
    by_estimate = torch.minimum(p[0], q[0]).sum() if method == "probabilistic" else p[0, q[0].argmax()]
    assert sum(chance for (count, *_), chance in expected.items() if count) == pytest.approx(float(by_estimate))

    set_seed(0)
    drafts = torch.stack([row.multinomial(copies, replacement=True) for row in q], 1)
    counts, following = accept(drafts, q.expand(copies, -1, -1), p.expand(copies, -1, -1))
    rows = zip(counts.tolist(), drafts.tolist(), following.tolist(), strict=True)
    found = Counter((count, *tokens[:count], last) for count, tokens, last in rows)
    assert found.keys() <= {outcome for outcome, chance in expected.items() if chance}
    for outcome, chance in expected.items():
        assert abs(found[outcome] - copies * chance) < 5 * (copies * chance * (1 - chance)) ** 0.5 + 1e-6, outcome
