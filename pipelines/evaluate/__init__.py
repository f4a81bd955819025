"""How well a protected tree hides its people, and what it cost: `scol evaluate` (docs/evaluate.md).

`pairs` brings original, protected photo and another photo of the same person together; `references` embeds the other
people to be mistaken for; `measure` is the one stage that looks at photos; `statistics` adds up; `page` shows; `job`
runs it all.
"""
