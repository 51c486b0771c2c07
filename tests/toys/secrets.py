"""Secrets of the kinds that an environment holds."""

from __future__ import annotations

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary",
    "AWS_SECRET_ACCESS_KEY": "aws/canary+canary/canary+canary/canary+1",
    "SOME_PASSWORD": "correct horse battery staple",
}
