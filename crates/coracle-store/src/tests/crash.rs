//! Each state that a crash, a full disk or another process can leave is produced, inspected and repaired.
//!
//! A scenario runs in a process of its own (this test binary again), which kills itself before its n-th effect on
//! disk, or gets `ENOSPC` there, or stops there while another scenario runs to its end; n = 1, 2, … until the
//! scenario passes. Afterwards the invariants hold, the scenario succeeds when repeated, and a collection leaves
//! nothing that nothing names.

use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use super::fixture::{Home, TestImage, assert_sound, assert_tidy, pull};
use crate::fault::injected;
use crate::object::ObjectId;
use crate::{Access, GcOptions, ImageQuery, LeaseKind, Store, StoreError};

/// Scenario, what happens, at which effect, and the two directories of the store; tabs between them.
const VARIABLE: &str = "CORACLE_STORE_TEST";
/// More effects than any scenario has.
const EFFECTS_MAX: u64 = 400;

const ONE: &str = "docker.io/library/one:latest";
const TWO: &str = "docker.io/library/two:latest";
const COPY: &str = "docker.io/library/copy:latest";

/// What a child does.
fn scenario(name: &str, dirs: &coracle_state::Dirs) -> Result<(), StoreError> {
    let store = Store::open(dirs, Access::Write)?;
    match name {
        "open" => Ok(()),
        "pull" => pull(&store, &TestImage::numbered(2), TWO).map(drop),
        "implied" => pull(&store, &implied(), TWO).map(drop),
        "tag" => {
            let lease = store.lease(LeaseKind::Read, "coracle tag")?;
            store.tag(&lease, &ImageQuery::Name(ONE.to_owned()), COPY).map(drop)
        }
        "rmi" => match store.remove_refs(&[ONE.to_owned()], true) {
            Ok(_) | Err(StoreError::NotFound(_)) => store.gc(&GcOptions::default()).map(drop),
            Err(e) => Err(e),
        },
        "gc" => store.gc(&GcOptions { deep: true }).map(drop),
        "collect" => {
            store.gc(&GcOptions::default())?;
            let report = store.gc(&GcOptions::default())?;
            assert!(report.waiting_for.is_empty(), "{report:?}");
            Ok(())
        }
        "run" => {
            let lease = store.lease(LeaseKind::Read, "coracle run")?;
            let query = ImageQuery::Name(ONE.to_owned());
            let Some(image) = store.resolve(&lease, &query, None)? else { return Ok(()) };
            crate::fault::point().unwrap();
            let all_there = store.layered_root(&image.chain, None)?.lowers.iter().all(|path| path.exists());
            assert!(all_there, "what was resolved is there as long as the lease is held");
            let container = dirs.containers().join("c1");
            std::fs::create_dir_all(dirs.containers().join(".new-c1")).unwrap();
            let layers: Vec<&str> = image.chain.iter().map(crate::DiffId::as_str).collect();
            let spec = serde_json::json!({ "image": { "id": image.id, "layers": layers } });
            std::fs::write(dirs.containers().join(".new-c1/spec.json"), spec.to_string()).unwrap();
            std::fs::rename(dirs.containers().join(".new-c1"), container).unwrap();
            crate::fault::point().unwrap();
            Ok(())
        }
        // Brings a layer of its own with the body of the image that `gc` has dropped.
        "same body" => {
            use super::fixture::{noise, tar};
            let image = TestImage::new("same body", &[tar(&[("copy", &noise(3, 20_000))])]);
            pull(&store, &image, TWO).map(drop)
        }
        // Until the power fails.
        "churn" => loop {
            println!("@begin pull");
            pull(&store, &TestImage::numbered(4), TWO)?;
            println!("@done pull");
            println!("@begin rmi");
            store.remove_refs(&[TWO.to_owned()], true)?;
            println!("@done rmi");
            store.gc(&GcOptions::default())?;
        },
        other => panic!("no scenario {other}"),
    }
}

/// Two layers of which the upper one implies a directory of the lower.
fn implied() -> TestImage {
    use super::fixture::tar;
    TestImage::new("implied", &[tar(&[("tmp/", b""), ("a", b"a")]), tar(&[("tmp/x", b"x")])])
}

/// The child's side: does nothing unless it was started by a test below.
#[test]
fn child() {
    #[expect(clippy::disallowed_methods, reason = "how the parent tells its child what to do")]
    let Ok(order) = std::env::var(VARIABLE) else { return };
    let words: Vec<&str> = order.split('\t').collect();
    let [name, action, at, data, run] = words[..] else { panic!("{order}") };
    let dirs = coracle_state::Dirs { data: data.into(), run: run.into() };
    let at = at.parse().unwrap();
    match action {
        "kill" => injected::kill_at(at),
        "full" => injected::full_at(at),
        "stop" => injected::stop_at(at),
        _ => {}
    }
    let result = scenario(name, &dirs);
    injected::full_at(u64::MAX);
    if action == "full" && injected::was_reached() {
        // A checkpoint, a clean-up at the end may fail without being the command's failure.
        if let Err(e) = result {
            assert!(e.is_out_of_space(), "{e:?}");
        }
        return;
    }
    result.unwrap();
}

/// Starts a child. `action` is `kill`, `full`, `stop` or `pass`.
pub(super) fn start(home: &Home, name: &str, action: &str, at: u64) -> Child {
    let (data, run) = (home.dirs.data.to_str().unwrap(), home.dirs.run.to_str().unwrap());
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::crash::child", "--nocapture", "--test-threads=1"])
        .env(VARIABLE, format!("{name}\t{action}\t{at}\t{data}\t{run}"))
        .stdin(Stdio::null())
        .stdout(if name == "churn" { Stdio::piped() } else { Stdio::null() })
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap()
}

/// Waits for a child; whether it was killed. Any other failure is one of the test.
pub(super) fn finish(child: Child, what: &str) -> bool {
    use std::os::unix::process::ExitStatusExt;
    let output = child.wait_with_output().unwrap();
    match output.status.signal() {
        Some(9) => true,
        _ => {
            assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
    }
}

/// Runs a scenario without a fault. In a process of its own: while this one starts children, they hold copies of
/// its locks until they have become another program.
pub(super) fn pass(home: &Home, name: &str, when: &str) {
    assert!(!finish(start(home, name, "pass", 0), when), "{when}");
}

/// A store with one image, and for `gc` another one that was just dropped.
fn prepared(name: &str) -> Home {
    let home = Home::new();
    if name == "open" {
        return home;
    }
    let store = home.store();
    pull(&store, &TestImage::numbered(1), ONE).unwrap();
    // The first collection of a boot is a deep one: not what these scenarios are about.
    store.gc(&GcOptions::default()).unwrap();
    if name == "gc" {
        let gone = TestImage::numbered(3);
        pull(&store, &gone, COPY).unwrap();
        store.drop_image(&gone.id(), false).unwrap();
    }
    home
}

/// Everything is right again after the scenario was repeated.
fn assert_recovers(home: &Home, name: &str, when: &str) {
    assert_sound(home, when);
    pass(home, name, &format!("{when}, repeated"));
    assert_sound(home, &format!("{when}, repeated"));
    let expected = match name {
        "open" => vec![],
        "pull" | "implied" => vec![ONE, TWO],
        "tag" => vec![COPY, ONE],
        "rmi" => vec![],
        _ => vec![ONE],
    };
    let store = home.store();
    let mut names: Vec<String> = store.images().unwrap().into_iter().flat_map(|s| s.image.refs).collect();
    names.sort();
    assert_eq!(names, expected, "{when}, repeated");
    drop(store);
    pass(home, "collect", &format!("{when}, collected"));
    assert_tidy(home, &format!("{when}, repeated and collected"));
    if name != "rmi" && name != "open" {
        let saved = std::fs::read_to_string(home.dirs.store().join("refs.json")).unwrap();
        assert!(expected.iter().all(|name| saved.contains(name)), "{when}: {saved}");
    }
}

/// Runs a scenario with a fault at each effect; gives back how many effects there are.
fn check_every_effect(name: &str, action: &str) -> u64 {
    for n in 1..EFFECTS_MAX {
        let home = prepared(name);
        let when = format!("{name}, {action} at effect {n}");
        let was_killed = finish(start(&home, name, action, n), &when);
        assert_recovers(&home, name, &when);
        let passed = if action == "kill" { !was_killed } else { n > 1 && is_past_the_end(&home, name, n) };
        if passed {
            return n - 1;
        }
    }
    panic!("{name} has more than {EFFECTS_MAX} effects");
}

/// Whether the scenario has fewer than `n` effects, counted in a child that is killed there if it has more.
fn is_past_the_end(_used: &Home, name: &str, n: u64) -> bool {
    let home = prepared(name);
    !finish(start(&home, name, "kill", n), "count")
}

#[test]
fn creating_a_store_survives_a_kill_anywhere() {
    assert!(check_every_effect("open", "kill") > 10);
}

#[test]
fn pull_survives_a_kill_anywhere() {
    let n = check_every_effect("pull", "kill");
    assert!(n > 30, "{n} effects: the points are not reached");
}

#[test]
fn pull_with_a_variant_survives_a_kill_anywhere() {
    assert!(check_every_effect("implied", "kill") > 30);
}

#[test]
fn tag_survives_a_kill_anywhere() {
    assert!(check_every_effect("tag", "kill") >= 3);
}

#[test]
fn rmi_survives_a_kill_anywhere() {
    assert!(check_every_effect("rmi", "kill") > 15);
}

#[test]
fn gc_survives_a_kill_anywhere() {
    assert!(check_every_effect("gc", "kill") > 10);
}

#[test]
fn pull_on_a_full_disk_fails_cleanly_anywhere() {
    assert!(check_every_effect("pull", "full") > 30);
}

#[test]
fn rmi_on_a_full_disk_fails_cleanly_anywhere() {
    assert!(check_every_effect("rmi", "full") > 15);
}

/// One pull is killed at each effect while another process pulls the same image.
#[test]
fn a_pull_beside_one_that_is_killed_succeeds() {
    for n in 1..EFFECTS_MAX {
        let home = prepared("pull");
        let when = format!("pull beside a pull killed at effect {n}");
        let (doomed, other) = (start(&home, "pull", "kill", n), start(&home, "pull", "pass", 0));
        let was_killed = finish(doomed, &when);
        assert!(!finish(other, &when), "{when}");
        assert_recovers(&home, "pull", &when);
        if !was_killed && n > 20 {
            return;
        }
    }
}

/// Whether the child stopped itself; otherwise it has ended well before its point, and was waited for.
fn has_stopped(child: &Child) -> bool {
    let (_, status) = waitpid(Some(pid(child)), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(status.stopped() || status.exit_status() == Some(0), "{status:?}");
    status.stopped()
}

/// Waits until a child ends, or long enough to say that it waits for somebody who is stopped; whether it ended.
fn wait_a_moment(child: &Child) -> bool {
    let ended = pidfd_open(pid(child), PidfdFlags::empty()).unwrap();
    let patience = Timespec { tv_sec: 0, tv_nsec: 700_000_000 };
    poll(&mut [PollFd::from_borrowed_fd(ended.as_fd(), PollFlags::IN)], Some(&patience)).unwrap() > 0
}

/// `first` stops at its n-th effect, `second` runs, to its end unless it has to wait for the first, and the first
/// goes on. For all n.
fn check_interleaving(first: &str, second: &str) {
    for n in 1..EFFECTS_MAX {
        let home = prepared(first);
        let when = format!("{first} stopped at effect {n} while {second} ran");
        let mut stopped = start(&home, first, "stop", n);
        if !has_stopped(&stopped) {
            drop(stopped.wait());
            return;
        }
        let other = start(&home, second, "pass", 0);
        wait_a_moment(&other);
        kill_process(pid(&stopped), Signal::CONT).unwrap();
        assert!(!finish(stopped, &when), "{when}");
        assert!(!finish(other, &when), "{when}");
        assert_sound(&home, &when);
        if first == "run" || second == "run" {
            std::fs::remove_dir_all(home.dirs.containers()).unwrap_or_default();
        }
        pass(&home, "collect", &when);
        assert_tidy(&home, &when);
    }
}

#[test]
fn pull_interrupted_by_rmi_is_sound() {
    check_interleaving("pull", "rmi");
}

#[test]
fn rmi_interrupted_by_pull_is_sound() {
    check_interleaving("rmi", "pull");
}

#[test]
fn run_interrupted_by_rmi_is_sound() {
    check_interleaving("run", "rmi");
}

#[test]
fn rmi_interrupted_by_run_is_sound() {
    check_interleaving("rmi", "run");
}

#[test]
fn gc_interrupted_by_pull_is_sound() {
    check_interleaving("gc", "pull");
}

/// A collection is killed at some effect, so that its next one goes on from there; a pull finds a body in place that
/// the collection then hides while the pull is stopped; the pull moves it back at its commit.
#[test]
fn a_pull_takes_back_what_a_collection_hid_meanwhile() {
    let body = ObjectId::of(&super::fixture::noise(3, 20_000));
    let mut n_hidden = 0;
    for killed_at in 1..EFFECTS_MAX {
        let home = prepared("gc");
        let was_killed = finish(start(&home, "gc", "kill", killed_at), "gc");
        let place = home.dirs.store().join("objects").join(body.path());
        // The last effects of a pull before its commit: the barriers, the names, the lock of the database.
        for stopped_at in (12..30).filter(|_| place.exists()) {
            // Layers are unpacked side by side, so that the moment has another number each time: until it was met
            // once, all are tried.
            if n_hidden > 0 && stopped_at % 3 != 0 {
                continue;
            }
            let when = format!("collection killed at effect {killed_at}, pull stopped at {stopped_at}");
            let mut puller = start(&home, "same body", "stop", stopped_at);
            if !has_stopped(&puller) {
                drop(puller.wait());
                break;
            }
            let collector = start(&home, "gc", "pass", 0);
            let is_hidden = || {
                let n = std::fs::read_dir(home.dirs.store().join("condemned")).unwrap().count();
                !place.exists() && n > 0
            };
            // The case must be met once; how long a loaded machine takes until then nobody knows.
            for _ in 0..if n_hidden == 0 { 10 } else { 1 } {
                if wait_a_moment(&collector) || is_hidden() {
                    break;
                }
            }
            n_hidden += usize::from(is_hidden());
            kill_process(pid(&puller), Signal::CONT).unwrap();
            assert!(!finish(puller, &when), "{when}");
            assert!(!finish(collector, &when), "{when}");
            assert_sound(&home, &when);
            assert!(place.exists(), "{when}");
            let store = home.store();
            store.remove_refs(&[TWO.to_owned()], true).unwrap();
            drop(store);
        }
        pass(&home, "collect", "after both");
        assert_tidy(&home, &format!("collection killed at effect {killed_at}"));
        if !was_killed {
            break;
        }
    }
    assert!(n_hidden > 0, "the collection never hid the body while the pull was stopped");
}
