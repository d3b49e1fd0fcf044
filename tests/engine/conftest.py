"""Imports that take seconds, once and in no test's time."""

from transformers import BertForSequenceClassification, GPT2LMHeadModel  # noqa: F401
