"""What a run gives away: pipelines, adapters, single files, model cards."""
