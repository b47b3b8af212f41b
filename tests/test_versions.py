"""What transformers renamed between the versions that we support: both names work, none of them warns."""

import json
import warnings

import pytest

from peagle_hf import PeagleTrainingArguments


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_either_name_of_checkpointing_works_with_every_version(tmp_path, name):
    options = {"every_n_layers": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value, given, read in [
            (True, '{"every_n_layers": 2}', options),
            (False, None, None),
            (True, options, options),
        ]:
            args = PeagleTrainingArguments(
                output_dir=str(tmp_path), use_cpu=True, **{name: value, f"{name}_kwargs": given}
            )
            assert args.activation_checkpointing is args.gradient_checkpointing is value
            assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == read
        args = PeagleTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert args.activation_checkpointing is args.gradient_checkpointing is False
