"""Speed and memory beside a peer, in one run: the scoreboard that ``dsv3 bench`` prints.

A time alone says little: it belongs to a machine, to a day, to what else ran in that minute. A
*ratio* says more, if both of its times were taken in the same run and in turn: ours, theirs, ours,
theirs (``rounds``). What disturbs the machine then disturbs both. So every row of the scoreboard
has a peer, a program that others wrote or the plain formula of the same thing, and where there is
no program to compare with, a limit: the time that the memory or the multipliers of the chip need.

    ours     a function of this package, as the model calls it
    peer     what it is measured against, and the goal for the ratio of the two
    check    that ours is right, before anything is timed: bit by bit where both must round alike,
             by the largest gap otherwise. What computes something else is reported, not timed.

A group of rows a module: ``quantization`` (1, 2), ``products`` (3 to 5), ``experts`` (6, 7),
``attention`` (8, 9), ``decoding`` (10, 11, 16), ``memory`` (12), ``drafting`` (13), ``chapters``
(14), ``training`` (15), ``footprint`` (17), ``make_run`` (18). A row has 20
rounds or more where its share of the time holds them, and says how many it had.
``row`` says what a row is and how it is measured, ``suite`` puts them together, ``plain`` has the
formulas, ``released`` the released code's way to run a model, ``peers`` what others made, and
``curves`` how costs grow.
"""
