//! Powers the guest off when its power button is pressed, as systemd-logind does on a full system.

use std::fs::{self, File};
use std::io::{self, Read};
use std::thread;

use rustix::system::{RebootCommand, reboot};

/// `struct input_event` of a 64-bit kernel: time (16 bytes), type, code, value.
const EVENT_LEN: usize = 24;
/// `EV_KEY`, `KEY_POWER` and "pressed", as they lie in an event (linux/input-event-codes.h).
const POWER_PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];

/// Watches every input device there is, each on a thread of its own. On return all are open: a press from then on is
/// not missed.
pub fn watch() -> io::Result<()> {
    let Ok(entries) = fs::read_dir("/dev/input") else {
        // Without the evdev module there is no such directory, and no button to press.
        return Ok(());
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("event") {
            let device = File::open(entry.path())?;
            thread::spawn(move || {
                if let Err(error) = wait_for_press(device).and_then(|()| power_off()) {
                    eprintln!("guest-init: {}: {error}", entry.path().display());
                }
            });
        }
    }
    Ok(())
}

fn wait_for_press(mut device: File) -> io::Result<()> {
    let mut event = [0; EVENT_LEN];
    loop {
        device.read_exact(&mut event)?;
        if event.ends_with(&POWER_PRESSED) {
            return Ok(());
        }
    }
}

fn power_off() -> io::Result<()> {
    rustix::fs::sync();
    Ok(reboot(RebootCommand::PowerOff)?)
}
