"""Several processes, one model.

* ``tensor``: who I am among the ranks, what I hold, what I send;
* ``environment``: what a launcher's variables say, checked before anything is loaded;
* ``launch`` and ``rank``: ranks on this machine, seen from the process that starts them and from
  a rank itself;
* ``join``: how ranks find each other, and what may be trusted;
* ``watch``, and ``roll`` with its rules: how those of several machines notice that one is lost;
* ``collectives``: the patterns of messages, by hand; ``traffic``: bytes by the link they cross;
* ``data``: gradients added up, and the optimizer's moments shared out (ZeRO-1);
* ``experts``: routed experts shared out over ranks, and tokens that travel to them; ``replicas``:
  copies of busy ones;
* ``schedules`` and ``timeline``: in which order a pipeline's ranks work, and when they wait;
  ``pipeline``: one that runs;
* ``agreement``: what all ranks must have alike, compared before it is relied on.
"""
