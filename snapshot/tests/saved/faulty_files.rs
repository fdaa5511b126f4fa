//! A file system that fails at a chosen step, and that forgets what was not synced when the power goes.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use cutover_snapshot::files::{Files, HostFiles, NewFile, NewFiles};

/// What happens at the chosen step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The disk is full: this step fails, later ones succeed.
    Full,
    /// The process dies: this step is half done, and no later one is done at all.
    Crash,
}

/// The host's file system with one fault. Nothing is synced for real: what would be lost is remembered instead.
#[derive(Clone)]
pub struct FaultyFiles(Arc<Mutex<Model>>);

struct Model {
    fault: Option<(usize, Fault)>,
    steps: usize,
    /// Files with content that is not permanent.
    unsynced_files: BTreeSet<PathBuf>,
    /// Files and directories whose entry is not permanent.
    unsynced_entries: BTreeSet<PathBuf>,
    /// A change of names that is not permanent.
    unsynced_rename: Option<Rename>,
}

/// A change of names.
#[derive(Clone)]
struct Rename {
    from: PathBuf,
    to: PathBuf,
    /// Whether what had the name got the other one.
    exchange: bool,
}

impl Rename {
    fn undo(&self) {
        if self.exchange {
            HostFiles.exchange(&self.to, &self.from).expect("can be undone");
        } else {
            fs::rename(&self.to, &self.from).expect("can be undone");
        }
    }
}

/// Which steps fail: all count, but a full disk is noticed only where something is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Stores,
    Other,
}

impl FaultyFiles {
    /// No fault.
    pub fn sound() -> Self {
        Self::new(None)
    }

    /// A fault at step `step`, from 0.
    pub fn failing(step: usize, fault: Fault) -> Self {
        Self::new(Some((step, fault)))
    }

    fn new(fault: Option<(usize, Fault)>) -> Self {
        Self(Arc::new(Mutex::new(Model {
            fault,
            steps: 0,
            unsynced_files: BTreeSet::new(),
            unsynced_entries: BTreeSet::new(),
            unsynced_rename: None,
        })))
    }

    /// Whether the chosen step was never reached.
    pub fn held(&self) -> bool {
        let model = self.model();
        model.fault.is_none_or(|(step, _)| model.steps <= step)
    }

    /// Removes from the disk what is not permanent; an unsynced change of name may have reached the disk or not.
    pub fn cut_power(&self, rename_lost: bool) {
        let mut model = self.model();
        if let Some(rename) = model.unsynced_rename.take().filter(|_| rename_lost) {
            rename.undo();
            model.move_paths(&rename.to, &rename.from);
        }
        for file in &model.unsynced_files {
            if file.exists() {
                fs::write(file, b"").expect("can be emptied");
            }
        }
        for entry in model.unsynced_entries.iter().rev() {
            if entry.is_dir() {
                fs::remove_dir_all(entry).expect("can be removed");
            } else if entry.exists() {
                fs::remove_file(entry).expect("can be removed");
            }
        }
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock().expect("not poisoned")
    }

    /// Counts a step; the error is the fault, if it is this step's turn.
    fn step(&self, step: Step) -> io::Result<()> {
        let mut model = self.model();
        let number = model.steps;
        model.steps += 1;
        match model.fault {
            Some((at, Fault::Full)) if number == at && step == Step::Stores => Err(io::ErrorKind::StorageFull.into()),
            Some((at, Fault::Crash)) if number >= at => Err(io::Error::other("the process is dead")),
            _ => Ok(()),
        }
    }
}

impl Model {
    fn move_paths(&mut self, from: &Path, to: &Path) {
        for paths in [&mut self.unsynced_files, &mut self.unsynced_entries] {
            *paths = std::mem::take(paths)
                .into_iter()
                .map(|path| match path.strip_prefix(from) {
                    Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
                    Ok(rest) => to.join(rest),
                    Err(_) => path,
                })
                .collect();
        }
    }
}

impl NewFiles for FaultyFiles {
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        self.step(Step::Stores)?;
        let inner = HostFiles.create(path)?;
        self.model().unsynced_entries.insert(path.to_owned());
        Ok(Box::new(FaultyFile {
            inner,
            path: path.to_owned(),
            files: self.clone(),
        }))
    }
}

impl Files for FaultyFiles {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step(Step::Stores)?;
        HostFiles.create_dir(path)?;
        self.model().unsynced_entries.insert(path.to_owned());
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step(Step::Other)?;
        let mut model = self.model();
        model.unsynced_entries.retain(|entry| entry.parent() != Some(path));
        if model
            .unsynced_rename
            .as_ref()
            .is_some_and(|rename| rename.to.parent() == Some(path))
        {
            model.unsynced_rename = None;
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(Step::Other)?;
        HostFiles.rename(from, to)?;
        let mut model = self.model();
        model.move_paths(from, to);
        // The new name is what is not permanent now; whether it is lost is up to who cuts the power.
        model.unsynced_entries.remove(to);
        model.unsynced_rename = Some(Rename {
            from: from.to_owned(),
            to: to.to_owned(),
            exchange: false,
        });
        Ok(())
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.step(Step::Other)?;
        HostFiles.exchange(one, other)?;
        let mut model = self.model();
        model.move_paths(one, other);
        model.unsynced_entries.remove(other);
        model.unsynced_rename = Some(Rename {
            from: one.to_owned(),
            to: other.to_owned(),
            exchange: true,
        });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(Step::Other)?;
        HostFiles.remove(path)
    }
}

struct FaultyFile {
    inner: Box<dyn NewFile>,
    path: PathBuf,
    files: FaultyFiles,
}

impl NewFile for FaultyFile {
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.files.model().unsynced_files.insert(self.path.clone());
        if let Err(fault) = self.files.step(Step::Stores) {
            self.inner.write_all_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(fault);
        }
        self.inner.write_all_at(bytes, offset)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.files.step(Step::Stores)?;
        self.files.model().unsynced_files.remove(&self.path);
        Ok(())
    }
}
