//! The power fails while images come and go: a loop device with ext4 is cut off at random moments.
//!
//! What was reported done is there afterwards; everything else is there completely, or not at all.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::event::{Timespec, poll};

use super::crash::{pass, start};
use super::fixture::{Home, assert_sound, assert_tidy};

/// Cuts in an ordinary run; `CORACLE_POWER_CUTS` asks for more.
const CUTS: u64 = 12;
const DISK_BYTES: u64 = 96 << 20;

/// A file system in a file, unmounted and removed at the end.
pub(super) struct Disk {
    dir: tempfile::TempDir,
    pub(super) mount_point: PathBuf,
}

fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Disk {
    /// An ext4 on a loop device, or why there cannot be one here.
    fn ext4() -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let image = dir.path().join("disk");
        File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).map_err(|e| e.to_string())?;
        run("mkfs.ext4", &["-q", "-F", text(&image)])?;
        let mount_point = dir.path().join("mnt");
        std::fs::create_dir(&mount_point).map_err(|e| e.to_string())?;
        let disk = Self { dir, mount_point };
        disk.mount()?;
        Ok(disk)
    }

    /// A small tmpfs, or why there cannot be one here.
    pub(super) fn tmpfs(size: &str) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let mount_point = dir.path().join("mnt");
        std::fs::create_dir(&mount_point).map_err(|e| e.to_string())?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", text(&mount_point)])?;
        Ok(Self { dir, mount_point })
    }

    fn mount(&self) -> Result<(), String> {
        let image = self.dir.path().join("disk");
        // The journal commits each second: cuts find it in all states.
        run("mount", &["-o", "loop,commit=1", text(&image), text(&self.mount_point)])
    }

    fn unmount(&self) -> Result<(), String> {
        run("umount", &[text(&self.mount_point)])
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.unmount());
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_was_done_survives_a_power_cut() {
    let disk = match Disk::ext4() {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    #[expect(clippy::disallowed_methods, reason = "longer runs are asked for by hand")]
    let cuts = std::env::var("CORACLE_POWER_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(CUTS);
    let home = Home::below(&disk.mount_point, &disk.dir.path().join("run"));
    drop(home.store());
    let mut random = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec.unsigned_abs() | 1;
    for cut in 0..cuts {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let lines_max = (random >> 40) % 5;
        let wait_ns = i64::try_from((random >> 33) % 30_000_000).unwrap();
        let Some(said) = churn_until_cut(&home, &disk, (lines_max, wait_ns)) else { return };
        println!("cut {cut}: {said:?}");
        let when = format!("cut {cut} after {said:?} and {wait_ns} ns");
        // As after a reboot: the run directory is new.
        std::fs::remove_dir_all(&home.dirs.run).unwrap();
        assert_sound(&home, &when);
        assert_done(&home, &said, &when);
        pass(&home, "pull", &when);
        pass(&home, "collect", &when);
        assert_sound(&home, &when);
        assert_tidy(&home, &when);
    }
}

/// Lets a child pull and remove, cuts the power after some lines of its, and mounts the disk again. Gives back what
/// it said; `None` if the power cannot be cut here.
fn churn_until_cut(home: &Home, disk: &Disk, (lines_max, wait_ns): (u64, i64)) -> Option<Vec<String>> {
    let mut child = start(home, "churn", "pass", 0);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    for _ in 0..lines_max {
        said.extend(lines.by_ref().map(Result::unwrap).find(|line| line.starts_with('@')));
    }
    poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: wait_ns })).unwrap();
    let root = File::open(&disk.mount_point).unwrap();
    let cut = coracle_sys::powercut::cut(root.as_fd());
    drop(root);
    child.kill().unwrap();
    child.wait().unwrap();
    said.extend(lines.map(Result::unwrap).filter(|line| line.starts_with('@')));
    if let Err(reason) = cut {
        println!("skipped: the power cannot be cut here: {reason}");
        return None;
    }
    disk.unmount().unwrap();
    disk.mount().unwrap();
    Some(said)
}

/// What the child reported last must be so: nothing was begun after it, or what was begun may be either way.
fn assert_done(home: &Home, said: &[String], when: &str) {
    let done = said.iter().rev().find(|line| line.starts_with("@done"));
    let is_busy = said.last().is_some_and(|line| line.starts_with("@begin"));
    let store = home.store();
    let names: Vec<String> = store.images().unwrap().into_iter().flat_map(|s| s.image.refs).collect();
    match done.map(String::as_str) {
        Some("@done pull") if !is_busy => assert_eq!(names.len(), 1, "{when}: {names:?}"),
        Some("@done rmi") if !is_busy => assert_eq!(names.len(), 0, "{when}: {names:?}"),
        _ => assert!(names.len() <= 1, "{when}: {names:?}"),
    }
}

#[test]
fn a_disk_that_is_really_full_is_named_and_given_back() {
    use super::fixture::{TestImage, noise, pull, tar};
    use coracle_base::{Explain, Kind};
    let disk = match Disk::tmpfs("4m") {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: {reason}");
            return;
        }
    };
    let home = Home::below(&disk.mount_point, &disk.dir.path().join("run"));
    let store = home.store();
    let small = TestImage::numbered(1);
    pull(&store, &small, "docker.io/library/small:latest").unwrap();
    let large = TestImage::new("large", &[tar(&[("a", &noise(1, 2 << 20)), ("b", &noise(2, 2 << 20))])]);
    for _ in 0..3 {
        let error = pull(&store, &large, "docker.io/library/large:latest").unwrap_err();
        assert!(error.is_out_of_space(), "{error:?}");
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.hint().unwrap().contains("prune"));
    }
    assert_sound(&home, "full disk");
    drop(store);
    pass(&home, "collect", "full disk");
    assert_tidy(&home, "full disk");
    let store = home.store();
    let fits = TestImage::new("fits", &[tar(&[("a", &noise(1, 1 << 20))])]);
    pull(&store, &fits, "docker.io/library/fits:latest").unwrap();
}
