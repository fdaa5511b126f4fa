//! What is asked for wrongly is refused with a message that says what to do.

use cutover_tests::Exit;
use cutover_tests::cli::cutover;

#[test]
fn help_shows_examples() {
    let help = cutover(["run", "--help"]);
    assert_eq!(help.exit, Exit::Shutdown);
    assert!(help.stdout.contains("cutover run --kernel"), "{}", help.stdout);
}
