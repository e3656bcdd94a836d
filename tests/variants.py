"""Variants of the scripts: each is one short function that replaces one function of a script.

    python tests/variants.py train_mxm:mil_nce --loss hard           # then come the script's own arguments
    python tests/variants.py train_cmaclip:foreign --robustness

To try an idea of your own, copy here the function of a script that it is about, change it, and say above it
what it replaces. A run goes to runs/<method>-<variant>-<data>, beside those of the script itself, and eval.py
evaluates its best.pt as one of the script's. Its settings say which variant it is.
"""
import contextlib
import importlib
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
import eval  # noqa: E402

VARIANTS = {}  # "script:variant" -> (the name of the function that is replaced, the function in its place)


def replaces(script, name):
    """Says that the function below is a variant: it takes the place of the function `name` of a script."""
    def register(function):
        VARIANTS[f"{script}:{function.__name__}"] = name, function
        return function
    return register


# ---------------------------------------------------------------- the variants

@replaces("train_mxm", "hard_loss")
def mil_nce(images, texts, scale, image_owner, text_owner):
    """MIL-NCE (Miech et al. 2020, arXiv 1912.06430, equation 1): -log of the positives' summed probability.
    One good positive is enough."""
    logits = scale * images @ texts.t()
    positive = image_owner[:, None] == text_owner[None, :]

    def one_direction(logits, positive):
        of_positives = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
        return (logits.logsumexp(1) - of_positives).mean()
    return one_direction(logits, positive) / 2 + one_direction(logits.t(), positive.t()) / 2


@replaces("train_cmaclip", "corrupt")
def foreign(images, tokens, noise):
    """Put random pixels and random words in place of a share of a batch's images, and of its texts.

    Arguments and result as of `corrupt`. Normalised pixels have a mean near 0 and a deviation near 1; a text
    keeps its length, its start and its end, which are the two largest ids.
    """
    share = torch.tensor(noise, dtype=torch.float64)
    replaced = torch.rand(2, len(images), dtype=torch.float64) < share[:, None]
    pixels = torch.randn(images.shape).to(images)
    start = int(tokens.max()) - 1
    words = torch.randint(1, start, tokens.shape).to(tokens)
    is_word = (tokens > 0) & (tokens < start)
    image_replaced, text_replaced = replaced.to(images.device)
    images = torch.where(image_replaced[:, None, None, None], pixels, images)
    return images, torch.where(text_replaced.to(tokens.device)[:, None] & is_word, words, tokens)


# ---------------------------------------------------------------- running one

@contextlib.contextmanager
def replaced(variant):
    """Inside, a script has the variant's function in place of its own. Yields the script's module."""
    data.expect(variant in VARIANTS, variant, f"no variant has this name; there are {', '.join(VARIANTS)}")
    script = importlib.import_module(variant.split(":")[0])
    name, function = VARIANTS[variant]
    own_function = getattr(script, name)
    own_settings = script.settings

    def settings(argv=None):
        args = own_settings(argv)
        args.variant = variant  # config.json and the checkpoints say so, and --resume wants the same
        return args

    setattr(script, name, function)
    script.settings = settings
    try:
        yield script
    finally:
        setattr(script, name, own_function)
        script.settings = own_settings


def main(argv=None):
    variant, *argv = (sys.argv[1:] if argv is None else argv) or ["no name"]
    with replaced(variant) as script:
        if not any(word.split("=")[0] == "--out" for word in argv):
            script_name, name = variant.split(":")
            method = script_name.removeprefix("train_")
            folder, run_name = os.path.split(script.settings(argv).out)
            argv = [*argv, "--out", os.path.join(folder, run_name.replace(method, f"{method}-{name}", 1))]
        script.main(argv)


if __name__ == "__main__":
    with eval.one_line_errors():
        main()
