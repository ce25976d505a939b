"""Networks trained to the end: one trainer, the tasks and the methods, and the commands that stand on them.

demo: digits, in a minute. ranking: does `alrao_fast.rank` order networks as a search does. quality: Alrao without
tuning against its rivals. paper: the tables and figures of the Alrao paper.
"""
