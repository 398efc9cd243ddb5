"""The stages of the pipeline, one file a stage: what it is asked, what is checked before, how it runs, what it answers.

`registry` names them; commands, flows, forms and deployments are made from it. `python -m diffusion_core.stages <stage>
<request URI>` runs one. A stage whose work is long does it in `work/`, which is imported when the work begins.
"""
