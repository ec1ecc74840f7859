"""Submit jobs to a Ray cluster from a machine that is no part of it.

::

    cluster   which cluster: address and token; whether it answers, takes the token, has GPUs
    parcel    what is sent: a job script, settings, a cohort, small bundles; never slides
    follow    submission ids, submitting, following, stopping
    probe     the job's first step, on the cluster: can it read what is named, and write `out`
"""
