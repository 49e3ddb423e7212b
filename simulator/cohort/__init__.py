"""The cohort engine: many devices' local training in one batched call, in the same virtual time, without HTTP."""
