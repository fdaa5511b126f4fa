//! Tables of what a group does, by hand; all interleavings are looked at in the model, all timings in the simulation.
