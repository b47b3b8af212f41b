"""The P-EAGLE training step of NeMo AutoModel 0.7.0 for `training_step.py`, with the settings of its own recipe.

Its recipe (`nemo_automodel.recipes.llm.train_eagle3` with `parallel_drafting`) trains bfloat16 weights, with AdamW
whose states are bfloat16 too, and runs the verifier in each step, since its cache of states is for EAGLE-3 alone. Here
the states are given, as to the others; what is left of the verifier is the product with its head, which the others also
have in their step. It doesn't pack: each sample is a row of its own, and the rows of a batch run one after another. Its
attention has no backward pass on a CPU.

`pip install --no-deps nemo-automodel==0.7.0` is enough, and leaves the versions of torch and transformers as they are:
beside these two, importing what is used here needs only datasets and pandas, which come with peagle-hf.
"""

from typing import Any

import torch


def make_nemo(sizes: Any, case: Any, device: str):
    from nemo_automodel.components.speculative.eagle.draft_llama import LlamaEagle3DraftModel
    from nemo_automodel.components.speculative.eagle.peagle_trainer import PEagleTrainerModule
    from training_step import DEPTH_RATIO, DEPTH_RATIO_MIN, MASK_TOKEN, layer_fields, loss_mask, random_states
    from transformers import LlamaConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = LlamaConfig(**layer_fields(sizes, case))
    for name, value in {
        "draft_vocab_size": case.draft_vocab,
        "target_hidden_size": sizes.hidden,
        "tie_word_embeddings": False,
        "parallel_drafting": True,
        "mask_token_id": MASK_TOKEN,
        "num_depths": case.depths,
        "fc_norm": False,
        "norm_output": False,
    }.items():
        setattr(config, name, value)
    with torch.device(device):
        draft = LlamaEagle3DraftModel(config).to(device=device, dtype=dtype)
        selected = torch.arange(case.draft_vocab)
        draft.set_vocab_mapping(selected)
        trainer = PEagleTrainerModule(
            draft,
            selected_token_ids=selected,
            selected_token_mask=torch.arange(sizes.vocab) < case.draft_vocab,
            num_depths=case.depths,
            mask_token_id=MASK_TOKEN,
            down_sample_ratio=DEPTH_RATIO,
            down_sample_ratio_min=DEPTH_RATIO_MIN,
        ).train()
        head = torch.empty(sizes.vocab, sizes.hidden, dtype=dtype).normal_(std=0.02)

    def make_step(case: Any):
        count = case.length // case.document
        states = random_states((count, case.document, 4 * sizes.hidden), device, 0)
        last_states = states[..., 3 * sizes.hidden :].contiguous()
        batch = {
            "input_ids": torch.randint(0, sizes.vocab, (count, case.document), device=device),
            "attention_mask": torch.ones(count, case.document, dtype=torch.long, device=device),
            "loss_mask": loss_mask(case.length, case.document).view(count, case.document).long().to(device),
            "aux_hidden_states": states[..., : 3 * sizes.hidden].contiguous(),
        }
        del states

        def forward_and_backward() -> torch.Tensor:
            with torch.no_grad():
                logits = last_states @ head.T
            loss = trainer(**batch, target_logits=logits).loss
            loss.backward()
            return loss.detach()

        return forward_and_backward, {}

    return trainer, make_step


def nemo_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as its recipe makes it by default."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
