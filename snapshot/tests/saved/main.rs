//! Saved state: what is written is read back, what is damaged is noticed, and nothing that fails leaves a trace.

mod archives;
mod chains;
mod crashes;
mod damage;
mod faulty_files;
mod golden;
mod hostile;
mod merging;
mod pruning;
mod remote;
mod sample;
mod sections;
mod state_file;
