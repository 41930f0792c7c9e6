"""Pictures that answer: sliders and a drawing, for JupyterLab.

Each widget is built from ipywidgets' controls and a ``Drawing`` of a ``Scene``; ``still()`` is
the same picture as a figure, and ``alt`` says what is to be seen. What a widget prints where no
widgets are shown is a fixed text, so that a stored notebook compares equal when it is run again.
"""

from dsv3.viz.widgets.balance import LoadBalanceSimulator
from dsv3.viz.widgets.draft_explorer import DraftExplorer
from dsv3.viz.widgets.drawing import Drawing
from dsv3.viz.widgets.explorer import RoutingExplorer
from dsv3.viz.widgets.kv_calculator import KVCacheCalculator
from dsv3.viz.widgets.microscope import ScaleMicroscope
from dsv3.viz.widgets.number_line import NumberLine
from dsv3.viz.widgets.placement import PlacementExplorer
from dsv3.viz.widgets.timeline import TimelineExplorer
from dsv3.viz.widgets.training_run import TrainingRun

__all__ = [
    "DraftExplorer",
    "Drawing",
    "KVCacheCalculator",
    "LoadBalanceSimulator",
    "NumberLine",
    "PlacementExplorer",
    "RoutingExplorer",
    "ScaleMicroscope",
    "TimelineExplorer",
    "TrainingRun",
]
