"""``generation_config.json``: how the makers of a checkpoint mean it to be sampled.

The file lies beside ``config.json`` and is optional. Three things in it are used:

* ``eos_token_id``, one id or several, takes the place of the config's, as in transformers: chat
  models end an answer with tokens that the config of their base model does not know;
* ``temperature``, ``top_p`` and ``top_k`` are defaults of the command line, where a flag wins;
* ``do_sample: false`` means greedy, whatever else is there.

Fields that would change the choice of tokens in ways that are not supported here are named to
the user (``ignored``), who otherwise would compare texts that were made by different rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.files import read_json

FILE = "generation_config.json"
# Fields that change which tokens are chosen, and the values with which they do not.
_NEUTRAL = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "stop_strings": ([],),
    "exponential_decay_length_penalty": (),
    "dola_layers": (),
    "watermarking_config": (),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What a file says; None where it says nothing.

    eos_ids: the tokens that end a text. temperature (0 for greedy), top_p, top_k: as in
    ``dsv3.generation.sampling.Sampling``. ignored: fields that ask for what is not supported.
    """

    eos_ids: tuple[int, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    ignored: tuple[str, ...] = ()

    @classmethod
    def beside(cls, folder: str | Path, vocab_size: int) -> GenerationConfig:
        """Read the file of a checkpoint folder; one without the file says nothing.

        vocab_size: the model's, which end tokens must lie below. Raises DSV3Error, naming file and
        field, for what makes no sense.
        """
        file = Path(folder) / FILE
        if not file.exists() and not file.is_symlink():
            return cls()
        data = read_json(file)
        if not isinstance(data, dict):
            raise DSV3Error(
                "is not a JSON object",
                where=file,
                found=type(data).__name__,
                fix=f"Mend it or remove it; {FILE} is optional",
            )
        given = {name: value for name, value in data.items() if value is not None}

        def check(name: str, fits: bool, expected: str) -> None:
            if not fits:
                raise DSV3Error(
                    "bad value",
                    where=f"{file}: {name}",
                    found=repr(given[name]),
                    expected=expected,
                    fix=f"Mend it or remove it; {FILE} is optional",
                )

        eos = None
        if "eos_token_id" in given:
            eos = given["eos_token_id"]
            eos = eos if isinstance(eos, list) else [eos]
            check(
                "eos_token_id",
                all(_whole(id) and 0 <= id < vocab_size for id in eos),
                f"token ids below vocab_size ({vocab_size})",
            )
        if "do_sample" in given:
            check("do_sample", isinstance(given["do_sample"], bool), "true or false")
        for name, low, high, expected in (
            ("temperature", 0, math.inf, "0 or more"),
            ("top_p", 0, 1, "more than 0, at most 1"),
        ):
            if name in given:
                value = given[name]
                number = _whole(value) or isinstance(value, float)
                check(
                    name,
                    number
                    and low <= value <= high
                    and value != math.inf
                    and (name == "temperature" or value > 0),
                    expected,
                )
        if "top_k" in given:
            check("top_k", _whole(given["top_k"]) and given["top_k"] >= 0, "an integer, 0 for all")
        temperature = given.get("temperature")
        if "do_sample" in given:
            temperature = (1.0 if temperature is None else temperature) * given["do_sample"]
        return cls(
            eos_ids=None if eos is None else tuple(eos),
            temperature=temperature,
            top_p=given.get("top_p"),
            top_k=given.get("top_k"),
            ignored=tuple(
                name
                for name, neutral in _NEUTRAL.items()
                if name in given and given[name] not in neutral
            ),
        )

    @property
    def defaults(self) -> dict[str, float | int]:
        """The options of ``Sampling`` that the file sets."""
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        return {name: value for name, value in values.items() if value is not None}


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
