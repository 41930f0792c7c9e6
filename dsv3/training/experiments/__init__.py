"""The report's experiments in small: the same questions, asked of models that learn in minutes.

An *experiment* compares *arms*: models that differ in one choice and in nothing else. Each arm is
trained several times, from different seeds. The runs of one seed are *paired*: in every arm they
read the same text in the same order, from first values that are the same wherever the shapes are.
What chance gives to one it then gives to the other, and their difference scatters less than either.

Small models answer small questions. An effect that shows at a million parameters and a million
tokens may vanish at 671 billion, and one that takes a trillion tokens to show does not show here.
So each experiment says beside its question what its answer does not tell.

``arms`` lists them, ``surgery`` makes models that a config cannot describe, ``runs`` trains them,
``results`` reads what came out. ``dsv3 experiment NAME`` is the command. ``gradients`` trains
nothing: it asks one step of a trained model where tiles and blocks differ.
"""

from dsv3.training.experiments.arms import EXPERIMENTS, Arm, Experiment
from dsv3.training.experiments.results import Results, read_results
from dsv3.training.experiments.runs import run_experiments

__all__ = ["EXPERIMENTS", "Arm", "Experiment", "Results", "read_results", "run_experiments"]
