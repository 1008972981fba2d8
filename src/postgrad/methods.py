"""The only registry: method name -> module that holds it."""

METHODS: dict[str, str] = {
    "align": "postgrad.alignment.align",
    "sft": "postgrad.alignment.sft",
    "annotate": "postgrad.alignment.annotate",
    "reward": "postgrad.alignment.reward",
    "sample": "postgrad.alignment.sample",
    "rejection": "postgrad.alignment.rejection",
    "dpo": "postgrad.alignment.dpo",
    "evaluate": "postgrad.alignment.evaluate",
}
