"""What a pipeline would do, and what that would take, before anything starts.

| module | what it says |
|---|---|
| `outlook` | what of the work is done already, and how much is left |
| `trial` | the programs that try a little of the work in a scratch folder, and who starts them |
| `estimate` | what follows from both: arithmetic alone |
| `plan` | the plan, where it is kept, and how it compares with what a pipeline took |

No Prefect and no Ray; in the store nothing is written but the plan itself.
"""
