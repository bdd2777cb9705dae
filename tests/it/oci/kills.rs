//! Races, and commands that are killed half-way.

use std::fs;

use super::bundle::{Bundle, ends_in_time, moment};

#[test]
fn of_twenty_creations_of_one_id_exactly_one_succeeds() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.id("race");
    let args = ["create", "-b", bundle.path(), id];
    let started: Vec<_> = (0..20).map(|_| bundle.begin(bundle.command(&args))).collect();
    let ended: Vec<_> = started.into_iter().map(|(child, files)| bundle.end(child, files, &args)).collect();
    assert_eq!(ended.iter().filter(|one| one.code == 0).count(), 1, "{ended:#?}");
    for one in ended.iter().filter(|one| one.code != 0) {
        one.fails(1, &["already exists", id]);
    }
    bundle.assert_status(id, "created");
    bundle.oci(&["start", id]).ok();
    bundle.oci(&["delete", "--force", id]).ok();
    bundle.assert_gone(id);
    bundle.assert_no_traces();
}

#[test]
fn of_many_starts_of_one_container_exactly_one_succeeds() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.id("starts");
    bundle.oci(&["create", "-b", bundle.path(), id]).ok();
    let args = ["start", id];
    let started: Vec<_> = (0..8).map(|_| bundle.begin(bundle.command(&args))).collect();
    let ended: Vec<_> = started.into_iter().map(|(child, files)| bundle.end(child, files, &args)).collect();
    assert_eq!(ended.iter().filter(|one| one.code == 0).count(), 1, "{ended:#?}");
    bundle.assert_status(id, "running");
    let args = ["delete", "--force", id];
    let started: Vec<_> = (0..4).map(|_| bundle.begin(bundle.command(&args))).collect();
    for (child, files) in started {
        bundle.end(child, files, &args).ok();
    }
    bundle.assert_gone(id);
    bundle.assert_no_traces();
}

/// Kills a command after some microseconds, then removes what there is and looks for what is left.
fn killed_at_many_moments(name: &str, prepare: &[&[&str]], args: &[&str]) {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    for round in 0..30_u64 {
        let id = &bundle.id(&format!("{name}{round}"));
        let with_id = |words: &[&str]| {
            words
                .iter()
                .chain(&[id.as_str()])
                .map(|word| word.replace("BUNDLE", bundle.path()))
                .collect::<Vec<_>>()
        };
        for words in prepare {
            let words = with_id(words);
            bundle.oci(&words.iter().map(String::as_str).collect::<Vec<_>>()).ok();
        }
        let words = with_id(args);
        let (mut child, _) =
            bundle.begin(bundle.command(&words.iter().map(String::as_str).collect::<Vec<_>>()));
        // Spread over what such a command takes on a slow machine.
        moment(round * round * 60);
        child.kill().ok();
        child.wait().unwrap();
        // Whatever is there answers, or says that there is nothing.
        let state = bundle.oci(&["state", id]);
        assert!(state.code == 0 || state.err.contains("does not exist"), "{state:?}");
        bundle.oci(&["delete", "--force", id]).ok();
        bundle.assert_gone(id);
        bundle.oci(&["delete", "--force", id]).ok();
    }
    bundle.assert_no_traces();
}

#[test]
fn a_killed_create_leaves_what_can_be_removed() {
    killed_at_many_moments("create", &[], &["create", "-b", "BUNDLE"]);
}

#[test]
fn a_killed_run_leaves_what_can_be_removed() {
    killed_at_many_moments("run", &[], &["run", "-b", "BUNDLE"]);
    killed_at_many_moments("detached", &[], &["run", "-d", "-b", "BUNDLE"]);
}

#[test]
fn a_killed_start_leaves_what_can_be_removed() {
    killed_at_many_moments("start", &[&["create", "-b", "BUNDLE"]], &["start"]);
}

#[test]
fn a_killed_delete_leaves_what_can_be_removed() {
    killed_at_many_moments("delete", &[&["run", "-d", "-b", "BUNDLE"]], &["delete", "--force"]);
}

#[test]
fn a_created_container_whose_process_is_killed_has_stopped() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    let id = &bundle.id("init");
    bundle.oci(&["create", "-b", bundle.path(), id]).ok();
    bundle.kill(id, "9");
    bundle.assert_status(id, "stopped");
    bundle.oci(&["start", id]).fails(1, &["cannot start a container that has stopped"]);
    bundle.oci(&["delete", id]).ok();
    bundle.assert_gone(id);
    bundle.assert_no_traces();
}

#[test]
fn half_of_a_container_can_be_removed_by_force() {
    let Some(bundle) = Bundle::new(&["sleep", "1000"]) else { return };
    // Only the claim.
    let id = &bundle.id("claim");
    fs::create_dir_all(bundle.state_dir(id)).unwrap();
    bundle.oci(&["state", id]).fails(1, &["does not exist"]);
    bundle.oci(&["delete", "-f", id]).ok();
    bundle.assert_gone(id);
    // A state that cannot be read, of a container that runs.
    for text in ["", "{", "{\"version\": 99}"] {
        let id = &bundle.running("damaged");
        let pid = i32::try_from(bundle.state(id)["pid"].as_i64().unwrap()).unwrap();
        fs::write(bundle.state_dir(id).join("state.json"), text).unwrap();
        bundle.oci(&["delete", id]).fails(1, &["cannot read the state"]);
        bundle.oci(&["delete", "-f", id]).ok();
        assert!(ends_in_time(pid));
        bundle.assert_gone(id);
    }
    // A bundle that is gone.
    let id = &bundle.running("bundle");
    fs::rename(&bundle.dir, bundle.sandbox.files.join("elsewhere")).unwrap();
    bundle.assert_status(id, "running");
    assert_eq!(bundle.oci(&["exec", id, "echo", "still"]).ok(), "still");
    bundle.oci(&["delete", "-f", id]).ok();
    bundle.assert_gone(id);
    bundle.assert_no_traces();
}
