//! The `cutover` command.

use cutover_api::exit::ExitStatus;

fn main() -> ExitStatus {
    cutover_api::main()
}
