"""Secrets in URLs and command lines are removed before anything is printed or recorded."""

import pytest

from peagle_hf.data.endpoint import public_url
from peagle_hf.redaction import public_command, public_settings


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("http://user:pw@host:8000/v1", "http://host:8000/v1"),
        ("http://pw@host", "http://host"),
        ("http://user:p@w/,x@host/v1", "http://host/v1"),
        ("http://user:pw@a:1/v1, https://user:pw@b", "http://a:1/v1, https://b"),
        ("https://host/v1?api_key=pw&x=1", "https://host/v1?api_key=***&x=1"),
    ],
)
def test_a_public_url_has_no_secret_and_is_the_same_otherwise(url, public):
    assert public_url(url) == public
    assert public_url(public) == public


@pytest.mark.parametrize(
    ("words", "public"),
    [
        ("serve m --api-key A B --port 8000", "serve m --api-key *** *** --port 8000"),
        ("--api_key=A=B --hf-token A=B -q", "--api_key=*** --hf-token *** -q"),
        ("env HF_TOKEN=A OMP_NUM_THREADS=2", "env HF_TOKEN=*** OMP_NUM_THREADS=2"),
        ("--otlp-traces-endpoint http://u:A@host/x", "--otlp-traces-endpoint http://host/x"),
        ("--endpoint=http://u:A@host --redis-password A", "--endpoint=http://host --redis-password ***"),
        ('--x {"hf_token":"A\\"B","k":"v"}', '--x {"hf_token":"***","k":"v"}'),
        (
            "--max-tokens 5 --mask-token-id 3 --tokenizer t --ssl-keyfile key.pem --max-num-batched-tokens 8",
            "--max-tokens 5 --mask-token-id 3 --tokenizer t --ssl-keyfile key.pem --max-num-batched-tokens 8",
        ),
    ],
)
def test_a_public_command_masks_the_values_of_secret_flags_only(words, public):
    assert public_command(words.split()) == public.split()


def test_public_settings_mask_secrets_at_any_depth():
    settings = {"train": {"hub_token": "A", "vllm_endpoint": "http://u:A@h", "mask_token_id": 3}, "suite": ["a", "b"]}
    public = {"train": {"hub_token": "***", "vllm_endpoint": "http://h", "mask_token_id": 3}, "suite": ["a", "b"]}
    assert public_settings(settings) == public
